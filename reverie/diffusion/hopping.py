r"""A solver made better by leaps: moved by chance, polished, and kept where starts it was not polished on say so.

Polishing goes downhill, and ends in a valley of its measure (polish.py, 1). There are many, and from a place beside
the lowest point of one it comes to another. What is asked of other starts is the error itself, which follows the
measure in the large and not from valley to valley: the typical one of starts that are drawn evenly, and the root mean
square as starts beside borders tell it (starts.py, 3): that of the few in ten thousand which end on the wrong
side.

References:
    Global Optimization by Basin-Hopping and the Lowest Energy Structures of Lennard-Jones Clusters (Wales & Doye, 1997)
    https://arxiv.org/abs/cond-mat/9803344
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reverie.base.randomness import generator
from reverie.diffusion.polish import AIM, FLOOR, Aim, attempt, polish, squares
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.walking import Bounds, pack, unpack

SIZES = (0.1, 0.2)  # of the leaps in turn: deviations of lambdas, in the shorter of the steps beside each
OF_WEIGHTS = 0.3  # of such a size, deviations of weights
STAGES = 2  # that a solver is polished on after a leap


@dataclass(frozen=True)
class Jury:
    """Starts by which solvers are chosen.

    Arguments:
        even: Drawn evenly.
        beside: Beside borders.
        mean: For how much the mean of squares counts in the choice, beside the typical error.
    """

    even: Trajectories
    beside: Trajectories
    mean: float = 0.5

    def error(self, recipe: Recipe) -> float:
        """Return a solver's error, the logarithm of a square; infinite where it leaves what numbers can hold."""
        squared = []
        for one in (self.even, self.beside):
            if (tried := attempt([one], recipe)) is None:
                return math.inf
            squared.append(squares(one, tried[0][0].x[-1]) + FLOOR)
        even, beside = squared
        typical, mean = (self.even.share * even.log()).sum(), (self.beside.share * beside).sum().log()
        return float((1 - self.mean) * typical + self.mean * mean)


def hopped(
    recipe: Recipe,
    stages: Sequence[Sequence[Trajectories]],
    jury: Jury,
    hops: int,
    rounds: int,
    aim: Aim = AIM,
    seed: int = 0,
) -> Recipe:
    """Return the best solver of those found by some leaps, each from the best before it.

    Arguments:
        recipe: Where to begin: that is returned where nothing is better.
        stages: What solvers are polished on, two after each leap, in turn.
        jury: By what they are chosen.
        hops: The number of leaps.
        rounds: Rounds of polishing on each of the two.
        aim: What polishing aims at.
        seed: Seed of the leaps.
    """
    random, bounds = generator(seed, "hopping"), Bounds.of(jury.even)
    best, least = recipe, jury.error(recipe)
    for hop in range(hops):
        tried = leapt(best, SIZES[hop % len(SIZES)], bounds, random)
        for measured in (stages[(hop + k) % len(stages)] for k in range(STAGES)):
            if attempt(measured, tried, aim) is not None:
                tried, _ = polish(measured, tried, rounds, aim=aim)
        error = jury.error(tried)
        if error < least:
            best, least = tried, error
    return best


def leapt(recipe: Recipe, size: float, bounds: Bounds, random: np.random.Generator) -> Recipe:
    """Return a recipe beside another: each lambda and each weight moved by chance.

    Example:
        >>> there = leapt(Recipe((-4.0, 0.0), ((1.0,), (1.5, -0.5))), 0.1, Bounds(-4.0, 4.0), generator(0, "example"))
        >>> [len(row) for row in there.weights], there.lam[0] < there.lam[1]
        ([1, 2], True)
    """
    lam = np.maximum(recipe.lam, bounds.least)
    steps = np.diff(lam, append=max(bounds.most, lam[-1] + 1))
    nearest = np.minimum(steps, np.concatenate([steps[:1], steps[:-1]]))
    lam = np.sort(lam + size * random.standard_normal(len(lam)) * nearest)
    rows = tuple(tuple(c + OF_WEIGHTS * size * random.standard_normal() for c in row) for row in recipe.weights)
    apart = tuple(float(value) + 1e-9 * k for k, value in enumerate(lam))
    return unpack(pack(Recipe(apart, rows, recipe.kept)), recipe, bounds)
