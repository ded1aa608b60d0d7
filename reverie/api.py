"""reverie from Python: load a model, sample from it, train one, write it, and make a picture again.

import reverie as rv

model = rv.load("runs/digits")                  # or a diffusers folder, or one .safetensors file
samples = rv.sample(model, 16, classes=7, steps=20, guidance=2.0, seed=0)
samples.pil()[0].save("seven.png")
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.base.registry import nearest
from reverie.data import open_dataset
from reverie.data.dataset import Dataset
from reverie.evaluation.figures import Evaluation
from reverie.models.card import sentence
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.model import Model, Samples
from reverie.models.provenance import again

LOADED = ("device", "ema", "speed", "weights")  # what of a request is for `load`

__all__ = ["again", "evaluate", "load", "sample", "save", "train", "tune"]


def sample(model: Model | Path | str, n: int = 1, **options: Any) -> Samples:
    """Draw samples from a model.

    Arguments:
        model: A model, or the path of one.
        n: How many.
        options: As `Model.sample` takes them: seed, classes, sampler, steps, grid, guidance, ...; device, ema,
            speed and weights, where a path is given, as `load` does.

    Raises:
        UsageError: Something is out of range, unknown, or would have no effect.
        ModelFileError: The path holds no model, or one that is damaged.
        NonFiniteError: A step gave NaN or infinity.
        OutOfMemoryError: There is not enough memory.
    """
    if not isinstance(model, Model):
        model = load(model, **{name: options.pop(name) for name in LOADED if name in options})
    return model.sample(n, **options)


def evaluate(subject: Model | Path | str, against: Dataset | Path | str, **options: Any) -> Evaluation:
    """Measure a model, or a folder of pictures, beside real images.

    Arguments:
        subject: A model, the path of one, or of pictures.
        against: The real images: a data set, or what `train` takes as data.
        options: As `reverie.evaluation.evaluate.evaluate` takes them: metrics, n, features, seed, ...; and how to
            sample a model, as `Model.sample` does; device, ema, speed and weights, where a path is given, as `load`
            does.

    Raises:
        UsageError: Something does not go together, or would have no effect.
        DataError: The images can't be read.
        ModelFileError: The path holds a damaged model.
        NonFiniteError: The model gave NaN or infinity.

    Example:
        found = rv.evaluate("runs/digits", "digits", n=500, metrics=["frechet"], steps=20)
        print(found.figures["frechet"].value, found.to_text())
    """
    from reverie.evaluation.evaluate import evaluate as measure
    from reverie.evaluation.subjects import open_against, open_subject

    how = {name: options.pop(name) for name in LOADED if name in options and not isinstance(subject, Model)}
    found = subject if isinstance(subject, Model) else open_subject(str(subject), **how)
    real = against if isinstance(against, Dataset) else open_against(str(against), found, options.get("size"))
    if not isinstance(found, Model):
        options.pop("size", None)
    for name in ("features_from", "held_out"):
        if isinstance(options.get(name), str | Path):
            options[name] = open_dataset(options[name], channels=real.shape[0], size=real.shape[1:])
    return measure(found, real, **options)


def save(model: Model, path: Path | str, kind: str | None = None, overwrite: bool = False) -> Path:
    """Write a model as a folder that diffusers opens, or as kind says: native, single-file.

    Raises:
        UsageError: There is something there already, or the format can't express the model.
        StorageError: The disk is full, read-only, gone or faulty.
    """
    return write_model(model, path, kind, overwrite)


def train(resume: str | bool = False, **options: Any) -> Path:
    """Train a model, or go on with a run, and return the run's folder.

    Arguments:
        resume: Go on with the run that is there; "auto" does so if there is one.
        options: The fields of `reverie.training.config.TrainConfig`, which are the flags of `reverie train`:
            data, out, steps, batch_size, ...

    Raises:
        UsageError: An option is unknown or out of range, or they do not go together.
        DataError: The data can't be read.
        Stopped: A signal ended it; its state is saved.

    Example:
        run = rv.train(data="digits", out="runs/digits", steps=1000)
    """
    from reverie.training.trainer import train as run_training

    if resume not in (False, True, "auto"):
        raise UsageError(f"resume is {resume!r}; it must be True, False or 'auto'")
    return run_training(make_config(options), "auto" if resume == "auto" else "yes" if resume else "no")


def tune(model: Model | Path | str, steps: int | Sequence[int], store: bool = True, **options: Any) -> Model:
    """Fit a solver to a model for each number of steps, so that sampler "auto" uses it. The network is not trained.

    Arguments:
        model: A model, or the path of one.
        steps: The numbers of evaluations.
        store: Of a model by its path, also keep the solvers in its card there.
        options: As `tune_model` takes them: guidance, samples, walks, rounds, seed, report.

    Returns:
        The model, with the solvers in its card.

    Raises:
        UsageError: An option is unknown or out of range, or there is no card at the path to keep a solver in.
        OutOfMemoryError: There is not enough memory for the trajectories.

    Example:
        model = rv.tune("runs/digits", steps=[5, 8])
    """
    from reverie.models.rewrite import store_solvers, with_solvers
    from reverie.models.tuning import tune_model

    found = model if isinstance(model, Model) else load(model)
    solvers = tune_model(found, [steps] if isinstance(steps, int) else list(steps), **options)
    if store and not isinstance(model, Model):
        store_solvers(model, solvers)
    return found.with_card(with_solvers(found.card, solvers))


def make_config(options: Mapping[str, Any]) -> Any:
    """Return the configuration of a training run.

    Raises:
        UsageError: An option is unknown or out of range, or they do not go together.
    """
    from reverie.training.config import TrainConfig

    for name in options:
        if name not in TrainConfig.model_fields:
            raise UsageError(f"train has no option {name!r}{nearest(name, TrainConfig.model_fields)}")
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    try:
        return TrainConfig(**plain)
    except ValidationError as error:
        raise UsageError(sentence(error, shown=100)) from None
