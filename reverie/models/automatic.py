"""Which sampler, where the request says `auto`: the model's own, else one fitted beforehand, else a published one.

docs/benchmarks.md has how far each is from the exact solution; on a model that has no solver of its own, another may
be nearer.
"""

import math
from typing import NamedTuple

from reverie.diffusion.recipes import general
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.learned import Learned, Recipe
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.schedules import Schedule
from reverie.models.card import Card, FittedSolver

AUTO = "auto"


class Choice(NamedTuple):
    """What was chosen.

    Arguments:
        name: What it is called in a record: tuned, general or unipc.
        sampler: The sampler.
        grid: The grid's name; None for a sampler with a grid of its own.
    """

    name: str
    sampler: Sampler
    grid: str | None


def choose(card: Card, schedule: Schedule, steps: int, guidance: float | None) -> Choice:
    """Return the sampler for so many steps: fitted to the model, or beforehand, or else UniPC.

    Arguments:
        card: The model's card, which holds the solvers that were fitted to it.
        schedule: Its schedule.
        steps: The steps that are asked for.
        guidance: The guidance; of two fitted solvers, the one nearest to it is taken.
    """
    if own := [fitted for fitted in card.sampling.fitted if fitted.steps == steps]:
        w = 1.0 if guidance is None else guidance
        nearest = min(own, key=lambda fitted: abs((1.0 if fitted.guidance is None else fitted.guidance) - w))
        return Choice("tuned", Learned(recipe(nearest)), None)
    if (ready := general(schedule, steps, math.prod(card.shape))) is not None:
        return Choice("general", Learned(ready), None)
    return Choice("unipc", UniPC(), "log-snr")


def recipe(fitted: FittedSolver) -> Recipe:
    """Return the recipe that a card holds."""
    return Recipe(fitted.lam, fitted.weights, fitted.kept)
