"""The sampler and the grid that are asked of a model, with the options that either takes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.registry import nearest
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.grids import from_times, from_timesteps
from reverie.diffusion.registry import grids, samplers
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.consistency import MeanFlow
from reverie.diffusion.samplers.learned import Learned
from reverie.diffusion.schedules import Schedule, Table
from reverie.models.automatic import choose
from reverie.models.card import Card
from reverie.models.guiding import KINDS, finite
from reverie.models.settling import whole

SETTINGS = (
    "seed",
    "classes",
    "prompt",
    "negative_prompt",
    "sampler",
    "steps",
    "grid",
    "guidance",
    *KINDS,
    "clip",
    "threshold",
    "size",
    "batch_size",
    "exact",
    "dtype",
    "cache_every",
    "upscale",
    "upscale_strength",
)


def sampler_options(sampler: type[Sampler] | Sampler) -> dict[str, Any]:
    """Return a sampler's options and their defaults.

    Example:
        >>> sampler_options(samplers["ddim"])
        {'eta': 0.0}
    """
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(sampler)
        if field.init
    }


def grid_options(grid: str | Sequence[float] | Tensor) -> list[str]:
    """Return the names of a grid's options: what its function takes beside the schedule and the steps.

    Example:
        >>> grid_options("karras"), grid_options([1.0, 0.5])
        (['rho'], [])
    """
    return list(inspect.signature(grids[grid]).parameters)[2:] if isinstance(grid, str) else []


def check_options(options: Mapping[str, Any], sampler: str | Sampler, grid: str | Sequence[float] | Tensor) -> None:
    """Refuse an option that neither the sampler nor the grid would look at."""
    named = isinstance(sampler, str)
    own = list(sampler_options(samplers[sampler] if isinstance(sampler, str) else sampler))
    times = grid_options(grid)
    for name in options:
        if name in own and not named:
            raise UsageError(f"{name} is given beside a sampler that has its own; name the sampler, or leave it out")
        if name not in (*own, *times):
            takes = f"sampler {sampler if isinstance(sampler, str) else sampler_name(sampler)} "
            takes += f"takes {', '.join(own) or 'no options'}"
            takes += f", grid {grid} {', '.join(times)}" if times else ""
            others = [other for other in samplers if name in sampler_options(samplers[other])]
            hint = f": it belongs to {', '.join(others)}" if others else nearest(name, [*SETTINGS, *own, *times])
            raise UsageError(f"{name} has no effect here{hint} ({takes})")


def settle_sampler(denoiser: NetworkDenoiser, card: Card, sampler: str | Sampler, asked: Mapping[str, Any]) -> Sampler:
    """Return the sampler, with the options that are asked for and the model's own where none are."""
    rule = sampler if isinstance(sampler, Sampler) else named_sampler(denoiser, card, sampler, asked)
    if isinstance(rule, MeanFlow) and "span" not in card.network.config.get("numbers", ()):
        raise UsageError("sampler mean-flow is for a network that was trained by objective mean-flow; take another")
    if getattr(rule, "variance", None) == "learned" and not denoiser.learned_variance:
        raise UsageError("variance is 'learned', but this model learned none; use small or large")
    return rule


def settle_automatic(
    denoiser: NetworkDenoiser, card: Card, grid: Any, steps: int | None, guidance: float | None
) -> tuple[str | Sampler, str | Tensor]:
    """Return the sampler and the grid that "auto" stands for."""
    if grid is not None:
        raise UsageError("sampler auto brings a grid of its own; leave grid out, or name a sampler")
    most = denoiser.schedule.timesteps if isinstance(denoiser.schedule, Table) else 1_000_000
    count = min(card.sampling.steps, most) if steps is None else whole("steps", steps, 1, most)
    choice = choose(card, denoiser.schedule, count, guidance)
    if isinstance(choice.sampler, Learned):
        return choice.sampler, own_grid(choice.sampler, denoiser.schedule, None)
    return choice.name, str(choice.grid)


def own_grid(sampler: Learned, schedule: Schedule, grid: Any) -> Tensor:
    """Return the times of a fitted solver, which has no others."""
    if grid is not None:
        raise UsageError("a fitted solver has a grid of its own; leave grid out, or name another sampler")
    return sampler.recipe.grid(schedule)


def named_sampler(denoiser: NetworkDenoiser, card: Card, name: str, asked: Mapping[str, Any]) -> Sampler:
    """Return the sampler of that name: what a model has learned is its default, then what its card says."""
    preferred: dict[str, Any] = {"variance": "learned"} if denoiser.learned_variance else {}
    preferred |= card.sampling.options if name == card.sampling.sampler else {}
    known = sampler_options(samplers[name])
    chosen = {option: value for option, value in {**preferred, **asked}.items() if option in known}
    for option, value in chosen.items():
        if isinstance(known[option], int | float) and isinstance(value, str):
            raise UsageError(f"{option} is {value!r}; it must be a number, as {known[option]} is")
    try:
        rule: Sampler = samplers[name](**chosen)
    except TypeError as error:
        raise UsageError(f"sampler {name} does not take {chosen}: {first_line(error)}") from None
    return rule


def settle_grid_options(card: Card, grid: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grid's options that are asked for, and the model's own where none are."""
    known = grid_options(grid)
    preferred = card.sampling.options if grid == card.sampling.grid else {}
    return {name: value for name, value in {**preferred, **asked}.items() if name in known}


def sampler_name(sampler: Sampler) -> str:
    """Return a sampler's name in the registry; that of its class where it has none there."""
    if isinstance(sampler, Learned):
        return "fitted"
    return next((name for name in samplers if samplers[name] is type(sampler)), type(sampler).__name__)


def settle_grid(
    schedule: Schedule,
    card: Card,
    grid: str | Sequence[float] | Tensor,
    steps: int | None,
    options: Mapping[str, Any],
) -> Float[Tensor, " n"]:
    """Return the times (N + 1,): of a grid by name, or the times or timesteps given."""
    if isinstance(grid, str):
        most = schedule.timesteps if isinstance(schedule, Table) else 1_000_000
        count = min(card.sampling.steps, most) if steps is None else whole("steps", steps, 1, most)
        try:
            return grids[grid](schedule, count, **options)
        except TypeError as error:
            raise UsageError(f"grid {grid} does not take {dict(options)}: {first_line(error)}") from None
    values: list[Any] = grid.tolist() if isinstance(grid, Tensor) else list(grid)
    if not values:
        raise UsageError("grid holds no times; give a name, or times in (0, 1], or a table's timesteps, decreasing")
    integers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    times = from_timesteps(schedule, values) if integers else from_times([finite("a time", t) for t in values])
    if steps is not None and steps != len(times) - 1:
        raise UsageError(f"steps is {steps}, but the grid has {len(times) - 1}; leave steps out")
    return times


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
