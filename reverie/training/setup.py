"""The parts of a run, made from its configuration; and what a resumed run may change."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.diffusion.denoisers import Denoiser, NetworkDenoiser
from reverie.diffusion.objectives import Hybrid, Objective, Simple, Variational
from reverie.diffusion.predictions import Prediction
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.times import ImportanceTimes, LogNormalTimes, TimeSampler, UniformTimes
from reverie.training.config import FEW_STEPS, FIXED, SCORES, TrainConfig
from reverie.training.few_step import few_step_times, make_few_step
from reverie.training.run_config import RunConfig
from reverie.training.scores import make_score
from reverie.training.start import starts_on

Config = TypeVar("Config", bound=RunConfig)


def make_times(config: TrainConfig, schedule: Schedule) -> TimeSampler:
    """Return the distribution of training times."""
    if config.objective in FEW_STEPS and "times" not in config.model_fields_set:
        return few_step_times(config, schedule)
    if config.times == "log-normal" or starts_on(schedule, config):
        return LogNormalTimes(schedule, -1.2 if config.time_mean is None else config.time_mean, config.time_std or 1.2)
    if config.times == "importance":
        return ImportanceTimes(schedule, bins=importance_bins(schedule))
    return UniformTimes(schedule)


def importance_bins(schedule: Schedule) -> int:
    """Return the number of bins of an importance sampler: about 100, dividing a table."""
    timesteps = getattr(schedule, "timesteps", 100)
    return next(bins for bins in range(min(100, timesteps), 0, -1) if timesteps % bins == 0)


def make_objective(
    config: TrainConfig,
    teacher: NetworkDenoiser | None = None,
    target: Denoiser | None = None,
    prediction: Prediction | None = None,
) -> Objective:
    """Return the objective; L_simple is in the space of what the network predicts.

    Arguments:
        config: The run's configuration.
        teacher: What an objective of few steps learns from, where it has a teacher.
        target: What makes a consistency objective's target, where that is not the network itself.
        prediction: What the network predicts, where that is not the configuration's.
    """
    if config.objective in FEW_STEPS:
        return make_few_step(config, teacher, target)
    if config.objective in SCORES:
        return make_score(config)
    simple = Simple(prediction or config.prediction, config.distance, config.weight)
    if config.objective == "hybrid":
        return Hybrid(simple)
    if config.objective == "vlb":
        return Variational("learned" if config.learned_variance else "small")
    return simple


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Return a run's configuration, of a model's run or of another kind.

    Raises:
        ModelFileError: Its config.json is damaged.
    """
    path = folder / "config.json"
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise ModelFileError(f"{path} is no configuration of a run ({why}); restore it from a copy") from None


def merge(config: Config, folder: Path, fixed: Sequence[str] = FIXED) -> tuple[Config, list[str]]:
    """Return the configuration of a resumed run, and its changes in words: what was said now, over what was said then.

    Raises:
        ModelFileError: The change would make it another run.
    """
    kind = type(config)
    before = read_config(folder, kind)
    said = {name: getattr(config, name) for name in kind.model_fields if name in config.model_fields_set - {"out"}}
    changed = {name: value for name, value in said.items() if value != getattr(before, name)}
    if others := [name for name in fixed if name in changed]:
        raise ModelFileError(describe_mismatch(folder, others, before, config))
    try:
        merged = kind(**(before.model_dump(exclude_unset=True) | changed | {"out": config.out}))
    except ValidationError as error:
        raise UsageError(f"the changes do not go with the run's configuration: {error.errors()[0]['msg']}") from None
    return merged, [f"{name}: {value}, was {getattr(before, name)}" for name, value in changed.items()]


def describe_mismatch(folder: Path, names: Sequence[str], before: RunConfig, now: RunConfig) -> str:
    """Return what differs, the first three and their number."""
    shown = "; ".join(f"{name} is {getattr(before, name)} there, {getattr(now, name)} here" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{folder} is another run: {shown}{more}; leave these out to resume it, or choose another --out"
