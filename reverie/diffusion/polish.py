r"""Polishing a fitted solver: all its times and weights at once, by damped least squares on the error at the end.

The regressions of tuning.py look one step ahead. Here all numbers of a recipe move together, so that the samples come
nearer to where the exact trajectories end. What is judged is the typical error and the mean error alike, of several
sets of trajectories in given parts,

    L = (1 - a) sum_i p_i ln d_i^2 + a ln (sum_i p_i d_i)^2 + b sum_j g_j^2,                                (1)

d_i^2 = e_i^2 + f, with e_i = |x_i - x*_i| of sample i, and f a part of the median of e_i^2, lest samples that are right
already count for most. At borders e_i is over the sample's sensitivity, and the mean then what the share of samples on
the wrong side, and so the square of the root mean square error of all, is in proportion to (starts.py). The root mean
square of what is fitted to says less: it is that of the few which are on the wrong side, and moving a solver a little
moves those a little, within the wrong mode. The last sum is what errors of the single estimates, of which a network
has some, would add: g_j is how the end moves with the j-th, of data of one Gaussian of unit variance, whose estimates
follow what came before (`gains`). Logarithms and roots lie below their tangents, so that lowering the squares weighted
by

    w_i = p_i (1 - a) / d_i^2 + p_i a / (d_i sum_j p_j d_j)                                                (2)

lowers (1): Levenberg's and Marquardt's rule does, with derivatives that need no graph (walking.py); a round costs about
3.5 N^2 evaluations of each sample for N steps, and N for each damping that is tried.

References:
    S4S: Solving for a Diffusion Model Solver (Frankel et al., 2025)
    https://arxiv.org/abs/2502.17423
    Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (Shaul et al., 2024)
    https://arxiv.org/abs/2403.01329
    An Algorithm for Least-Squares Estimation of Nonlinear Parameters (Marquardt, 1963)
    https://doi.org/10.1137/0111030
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import NonFiniteError
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.walking import (
    NUDGE,
    Bounds,
    Path,
    Smooth,
    blend,
    derivatives,
    follow,
    joined,
    of_lambdas,
    pack,
    room,
    unpack,
)

TYPICAL = 0.1  # f of (1), in medians of the squared error
FLOOR = 1e-14  # added to squared errors before their logarithm is taken
DAMPINGS = tuple(10.0 ** (k / 2) for k in range(-14, 5))  # that a round tries
FEWER = 4  # of so many dampings one is tried where each asks a network
ROUNDING = 1e-12  # of a lambda
ENOUGH = 1e-4  # what a round must gain for another to follow


class Aim(NamedTuple):
    """What counts for how much in (1).

    Arguments:
        mean: a: the mean error, beside the typical one.
        noise: b: errors of the single estimates. Little, where the model that is fitted to is the one that is sampled.
    """

    mean: float = 0.5
    noise: float = 1e-3


AIM = Aim()


# The measure ------------------------------------------------------------------------------------


def squares(one: Trajectories, end: Data) -> Float[Tensor, " m"]:
    """Return each sample's squared error (M,), a number's mean, over what the set's errors are divided by."""
    return (end - one.end).double().flatten(1).square().sum(1) / (one.numbers * one.scale.square())


def floor(one: Trajectories, e: Tensor) -> float:
    """Return f of (1)."""
    order = e.argsort()
    middle = int((one.share[order].cumsum(0) >= 0.5 * one.share.sum()).nonzero()[0])
    return TYPICAL * e[order][middle].item() + FLOOR


def distances(one: Trajectories, end: Data) -> Float[Tensor, " m"]:
    """Return d (M,) of (1)."""
    e = squares(one, end)
    return (e + floor(one, e)).sqrt()


def parts(sets: Sequence[Trajectories]) -> list[float]:
    """Return for how much of the whole each set counts."""
    return [one.part / sum(other.part for other in sets) for one in sets]


def measure(sets: Sequence[Trajectories], recipe: Recipe, paths: Sequence[Path], aim: Aim = AIM) -> float:
    """Return L of (1)."""
    total = 0.0
    for one, path, part in zip(sets, paths, parts(sets), strict=True):
        d = distances(one, path.x[-1])
        typical = (one.share * d.log()).sum().item()
        total += 2 * part * ((1 - aim.mean) * typical + aim.mean * math.log((one.share * d).sum().item()))
    return total + aim.noise * float(gains(recipe).square().sum())


def gains(recipe: Recipe) -> Float[Tensor, " n"]:
    r"""Return how the end moves with an error of each estimate, g of (1), of data of one Gaussian of unit variance.

    There the estimate is z / (1 + rho^2), so that with e_j an error of the j-th

        D_j = z_j / (1 + rho_j^2) + e_j,    g_j = d z_N / d e_j,                                        (3)

    a recursion by learned.py (1). Weights that extrapolate from estimates which lie close together have large ones.

    Example:
        >>> gains(Recipe((-5.0,), ((1.0,),))).tolist()
        [1.0]
    """
    rho, n = [math.exp(-lam) for lam in recipe.lam] + [0.0], recipe.steps
    z, estimates, errors = torch.zeros(n, dtype=torch.float64), list[Tensor](), torch.eye(n, dtype=torch.float64)
    for k, (row, kept) in enumerate(zip(recipe.weights, (*recipe.kept, 1.0), strict=True)):
        estimates.append(z / (1 + rho[k] ** 2) + errors[k])
        share = rho[k + 1] / rho[k]
        z = share * kept * z + (1 - share) * blend(row, estimates)
    return z


def gains_slope(recipe: Recipe, bounds: Bounds) -> Float[Tensor, "n p"]:
    """Return how the gains change with each of the recipe's numbers, by differences."""
    theta, here = pack(recipe), gains(recipe)
    axes = torch.eye(len(theta), dtype=torch.float64)
    moved = [gains(unpack(theta + NUDGE * axis, recipe, bounds)) for axis in axes]
    return (torch.stack(moved, 1) - here[:, None]) / NUDGE


# The rounds -------------------------------------------------------------------------------------


def polish(
    sets: Sequence[Trajectories],
    recipe: Recipe,
    rounds: int,
    progress: Callable[[int, float], None] | None = None,
    aim: Aim = AIM,
) -> tuple[Recipe, float]:
    """Return a recipe made better on some sets of trajectories, and L of (1); it is never worse there.

    Arguments:
        sets: Exact trajectories, of one model or of several.
        recipe: What to begin with.
        rounds: How often the derivatives may be taken.
        progress: Called with the rounds done and L.
        aim: a and b of (1).
    """
    bounds = Bounds.of(sets[0])
    # The measure is rough, and where one damping leads uphill a lower may not; a try of a network costs something.
    dampings = DAMPINGS if all(isinstance(one.denoiser, Smooth) for one in sets) else DAMPINGS[::FEWER]
    paths = [follow(one, recipe) for one in sets]
    best = measure(sets, recipe, paths, aim)
    for done in range(1, rounds + 1):
        found, least = recipe, best
        normal, gradient = equations(sets, recipe, paths, aim)
        for damping in dampings:
            move = within(damped(normal, damping), gradient, recipe, bounds)
            tried = unpack(pack(recipe) - move, recipe, bounds)
            there = attempt(sets, tried, aim)
            if there is not None and there[1] < least:
                found, (paths, least) = tried, there
        if progress:
            progress(done, least)
        gained, recipe, best = best - least, found, least
        if gained < ENOUGH:
            break
    return recipe, best


def damped(matrix: Tensor, damping: float) -> Float[Tensor, "p p"]:
    """Return normal equations' matrix, damped by so much of its diagonal."""
    diagonal = matrix.diagonal()
    return matrix + torch.diag(damping * diagonal + 1e-12 * diagonal.max())


def within(matrix: Tensor, side: Tensor, recipe: Recipe, bounds: Bounds) -> Float[Tensor, " p"]:
    """Return the solution of normal equations that keeps lambdas in order and within bounds: of those that would come
    too near to each other both move alike, and those that would leave the bounds stay."""
    theta, places = pack(recipe), of_lambdas(recipe)
    before = room(theta[places], recipe, bounds)
    stuck = torch.zeros_like(before, dtype=torch.bool)
    while True:
        ways = joined(len(theta), places, stuck)
        move = ways @ torch.linalg.solve(ways.mT @ matrix @ ways, ways.mT @ side)
        short = ~stuck & (room((theta - move)[places], recipe, bounds) < before.clamp(max=0) - ROUNDING)
        if not bool(short.any()):
            return move
        stuck |= short


def attempt(sets: Sequence[Trajectories], recipe: Recipe, aim: Aim = AIM) -> tuple[list[Path], float] | None:
    """Return the walks of a recipe and L of (1); None where they leave what numbers can hold."""
    try:
        paths = [follow(one, recipe) for one in sets]
    except NonFiniteError:
        return None
    value = measure(sets, recipe, paths, aim)
    return (paths, value) if math.isfinite(value) else None


def judged(sets: Sequence[Trajectories], recipes: Sequence[Recipe], aim: Aim = AIM) -> list[tuple[Recipe, float]]:
    """Return recipes with their errors on some sets, the best first; without those that leave what numbers can hold."""
    found = [(recipe, tried[1]) for recipe in recipes if (tried := attempt(sets, recipe, aim)) is not None]
    return sorted(found, key=lambda one: one[1])


def equations(sets: Sequence[Trajectories], recipe: Recipe, paths: Sequence[Path], aim: Aim) -> tuple[Tensor, Tensor]:
    """Return the normal equations' matrix (P, P) and right-hand side (P,), of the squares weighted by (2)."""
    numbers = len(pack(recipe))
    matrix = torch.zeros(numbers, numbers, dtype=torch.float64)
    side = torch.zeros(numbers, dtype=torch.float64)
    for one, path, part in zip(sets, paths, parts(sets), strict=True):
        slope = derivatives(one, recipe, path).double()
        d = distances(one, path.x[-1])
        weight = part * one.share / d * ((1 - aim.mean) / d + aim.mean / (one.share * d).sum())
        weighted = slope * (weight / (one.numbers * one.scale.square()))[:, None, None]
        off = (path.x[-1] - one.end).double().flatten()
        matrix += (weighted.flatten(0, 1).mT @ slope.flatten(0, 1)).cpu()
        side += (off @ weighted.flatten(0, 1)).cpu()
    slope = gains_slope(recipe, Bounds.of(sets[0]))
    return matrix + aim.noise * slope.mT @ slope, side + aim.noise * slope.mT @ gains(recipe)
