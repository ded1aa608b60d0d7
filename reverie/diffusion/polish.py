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

lowers (1): Levenberg's and Marquardt's rule does. The derivatives are carried along the walk, in forward mode; how an
estimate changes with x is a difference of two, unless the denoiser says it itself. So nothing is differentiated by a
graph, and any denoiser will do, guided or clipped; a round costs about 3 N^2 evaluations of each sample for N steps.

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
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import NonFiniteError
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import ask
from reverie.diffusion.samplers.learned import Recipe, factors
from reverie.diffusion.trajectories import Trajectories

MEAN = 0.5  # a of (1)
TYPICAL = 0.1  # f of (1), in medians of the squared error
NOISE = 1e-3  # b of (1), where the model that is fitted to is the one that is sampled
NUDGE = 1e-5  # for the derivatives of g
FLOOR = 1e-14  # added to squared errors before their logarithm is taken
GAP = 0.02  # the least step, in lambda
TRIES = 6  # dampings that a round tries
ENOUGH = 1e-3  # what a round must gain for another to follow


@runtime_checkable
class Smooth(Protocol):
    """A denoiser that knows how its estimate changes with x."""

    def along(self, x: Tensor, t: Tensor, moves: Tensor) -> Tensor:
        """Return the change of the estimate along each of some directions, (B, n, P)."""


@dataclass(frozen=True)
class Path:
    """A walk of a recipe on one set.

    Arguments:
        x: Where the samples are before each step, and at the end.
        estimates: Their estimates before each step.
    """

    x: list[Data]
    estimates: list[Data]


def follow(one: Trajectories, recipe: Recipe) -> Path:
    """Return the walk of a recipe from where a set's trajectories start."""
    known = recipe_levels(one, recipe)
    xs, estimates = [one.x[0]], []
    for k, row in enumerate(recipe.weights):
        estimates.append(estimate(one.denoiser, xs[-1], known[k]))
        keep, gain = factors(known[k], known[k + 1])
        xs.append(keep * xs[-1] + gain * blend(row, estimates))
    return Path(xs, estimates)


def recipe_levels(one: Trajectories, recipe: Recipe) -> list[Level]:
    """Return the levels at the ends of a recipe's steps."""
    schedule = one.denoiser.schedule
    return levels(schedule, recipe.grid(schedule).tolist())


def estimate(denoiser: Denoiser, x: Data, level: Level) -> Data:
    """Return the estimate at one level."""
    return ask(denoiser, x, torch.tensor([level.t], dtype=torch.float64).expand(len(x))).x0


def blend(row: Sequence[float], estimates: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of the last estimates, the row's first weight the last one's."""
    return sum((c * estimates[-1 - j] for j, c in enumerate(row)), torch.zeros_like(estimates[-1]))


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


def measure(sets: Sequence[Trajectories], recipe: Recipe, paths: Sequence[Path], noise: float = NOISE) -> float:
    """Return L of (1), with b `noise`."""
    total = 0.0
    for one, path, part in zip(sets, paths, parts(sets), strict=True):
        d = distances(one, path.x[-1])
        typical = (one.share * d.log()).sum().item()
        total += 2 * part * ((1 - MEAN) * typical + MEAN * math.log((one.share * d).sum().item()))
    return total + noise * float(gains(recipe).square().sum())


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
    for k, row in enumerate(recipe.weights):
        estimates.append(z / (1 + rho[k] ** 2) + errors[k])
        kept = rho[k + 1] / rho[k]
        z = kept * z + (1 - kept) * blend(row, estimates)
    return z


def gains_slope(recipe: Recipe, most: float) -> Float[Tensor, "n p"]:
    """Return how the gains change with each of the recipe's numbers, by differences."""
    theta, here = pack(recipe), gains(recipe)
    moved = [gains(unpack(theta + NUDGE * axis, recipe, most)) for axis in torch.eye(len(theta), dtype=torch.float64)]
    return (torch.stack(moved, 1) - here[:, None]) / NUDGE


# The numbers of a recipe, in the order in which they come into play ----------------------------------


def pack(recipe: Recipe) -> Float[Tensor, " p"]:
    """Return a recipe's numbers: of each step its weights, and the lambda of the next."""
    ahead = [*recipe.lam[1:], None]
    numbers = [[*row, *([] if lam is None else [lam])] for row, lam in zip(recipe.weights, ahead, strict=True)]
    return torch.tensor([value for part in numbers for value in part], dtype=torch.float64)


def unpack(theta: Float[Tensor, " p"], like: Recipe, most: float) -> Recipe:
    """Return the recipe of these numbers, its lambdas moved apart and below the last where they aren't."""
    left, lam, rows = theta.tolist(), [like.lam[0]], []
    for k, row in enumerate(like.weights):
        rows.append(tuple(left[: len(row)]))
        if k + 1 < like.steps:
            due = min(left[len(row)], most - GAP * (like.steps - 2 - k))
            lam.append(max(due, lam[-1] + GAP))
        left = left[len(row) + 1 :]
    return Recipe(tuple(lam), tuple(rows))


# Derivatives ------------------------------------------------------------------------------------


def derivatives(one: Trajectories, recipe: Recipe, path: Path) -> Float[Tensor, "m n p"]:
    """Return how the last state (M, n) changes with each of the recipe's numbers (P)."""
    known, numbers = recipe_levels(one, recipe), len(pack(recipe))
    x = path.x[0].flatten(1)
    moved = torch.zeros(*x.shape, numbers, dtype=x.dtype, device=x.device)
    told: list[Tensor] = []  # of the last estimates, for the numbers that came before each
    used, past_used = 0, max(len(row) for row in recipe.weights)
    for k, row in enumerate(recipe.weights):
        here, there, before = known[k], known[k + 1], used
        change = along(one.denoiser, path.x[k], here, moved[..., :before]) if before else moved[..., :0]
        if before:  # the last of them is this step's own lambda
            change[..., -1] += with_lambda(one.denoiser, path.x[k], here, path.estimates[k])
        told = [*told, change][-past_used:]
        keep, gain = factors(here, there)
        past = path.estimates[: k + 1]
        total = blend(row, past).flatten(1)
        moved[..., :before] *= keep
        for c, estimate_moved in zip(row, reversed(told), strict=False):
            moved[..., : estimate_moved.shape[-1]].add_(estimate_moved, alpha=gain * c)
        if before:
            moved[..., before - 1] += factor_change(one, here, there, True, path.x[k].flatten(1), total)
        for j in range(len(row)):
            moved[..., used + j] = gain * past[-1 - j].flatten(1)
        used += len(row)
        if k + 1 < recipe.steps:
            moved[..., used] = factor_change(one, here, there, False, path.x[k].flatten(1), total)
            used += 1
    return moved


def along(denoiser: Denoiser, x: Data, level: Level, moves: Float[Tensor, "m n p"]) -> Float[Tensor, "m n p"]:
    """Return how the estimate changes as x moves along each of some directions."""
    t = torch.tensor([level.t], dtype=torch.float64, device=x.device).expand(len(x))
    if isinstance(denoiser, Smooth):
        return denoiser.along(x, t, moves)
    here, changes = estimate(denoiser, x, level), []
    for direction in moves.unbind(-1):
        # Each sample by as much as it can tell from rounding.
        length = direction.double().square().mean(1).sqrt().clamp(min=1e-30)
        size = (nudge(x) * x.double().flatten(1).square().mean(1).sqrt().clamp(min=1e-3) / length).to(x.dtype)[:, None]
        there = estimate(denoiser, x + (size * direction).reshape(x.shape), level)
        changes.append((there - here).flatten(1) / size)
    return torch.stack(changes, dim=-1)


def nudge(x: Tensor) -> float:
    """Return the relative size of a difference: between rounding, and how far a straight line goes."""
    return float(torch.finfo(x.dtype).eps ** 0.4)


def with_lambda(denoiser: Denoiser, x: Data, level: Level, here: Data) -> Float[Tensor, "m n"]:
    """Return how the estimate changes with lambda, x being where it is."""
    (near,) = at_lambda(denoiser, [level.lam - (size := nudge(x))])
    return (here - estimate(denoiser, x, near)).flatten(1) / size


def at_lambda(denoiser: Denoiser, lam: Sequence[float]) -> list[Level]:
    """Return the levels at some lambdas."""
    schedule = denoiser.schedule
    return levels(schedule, schedule.time(2 * torch.tensor(lam, dtype=torch.float64)).clamp(max=1).tolist())


def factor_change(one: Trajectories, here: Level, there: Level, first: bool, x: Tensor, total: Tensor) -> Tensor:
    """Return how a step's result changes with the lambda that it begins at (first), or that it ends at, its estimates
    being what they are."""
    size = 1e-5
    low, high = at_lambda(one.denoiser, [lam + (here if first else there).lam for lam in (-size, size)])
    ends = [factors(level, there) if first else factors(here, level) for level in (low, high)]
    keep, gain = ((b - a) / (2 * size) for a, b in zip(*ends, strict=True))
    return keep * x + gain * total


# The rounds -------------------------------------------------------------------------------------


def polish(
    sets: Sequence[Trajectories],
    recipe: Recipe,
    rounds: int,
    progress: Callable[[int, float], None] | None = None,
    noise: float = NOISE,
) -> tuple[Recipe, float]:
    """Return a recipe made better on some sets of trajectories, and L of (1); it is never worse there.

    Arguments:
        sets: Exact trajectories, of one model or of several.
        recipe: What to begin with.
        rounds: How often the derivatives may be taken.
        progress: Called with the rounds done and L.
        noise: b of (1).
    """
    most, damping = max(level.lam for level in sets[0].known), 1e-2
    paths = [follow(one, recipe) for one in sets]
    best = measure(sets, recipe, paths, noise)
    for done in range(1, rounds + 1):
        found = None
        normal, gradient = equations(sets, recipe, paths, noise)
        for _ in range(TRIES):
            damped = normal + torch.diag(damping * normal.diagonal() + 1e-12 * normal.diagonal().max())
            tried = unpack(pack(recipe) - torch.linalg.solve(damped, gradient), recipe, most)
            found = attempt(sets, tried, noise)
            if found is not None and found[1] < best:
                damping = max(damping / 4, 1e-7)
                break
            found, damping = None, damping * 5
        if progress:
            progress(done, best if found is None else found[1])
        if found is None:
            break
        gained = best - found[1]
        recipe, (paths, best) = tried, found
        if gained < ENOUGH:
            break
    return recipe, best


def attempt(sets: Sequence[Trajectories], recipe: Recipe, noise: float = NOISE) -> tuple[list[Path], float] | None:
    """Return the walks of a recipe and L of (1); None where they leave what numbers can hold."""
    try:
        paths = [follow(one, recipe) for one in sets]
    except NonFiniteError:
        return None
    value = measure(sets, recipe, paths, noise)
    return (paths, value) if math.isfinite(value) else None


def equations(
    sets: Sequence[Trajectories], recipe: Recipe, paths: Sequence[Path], noise: float
) -> tuple[Tensor, Tensor]:
    """Return the normal equations' matrix (P, P) and right-hand side (P,), of the squares weighted by (2)."""
    numbers = len(pack(recipe))
    matrix = torch.zeros(numbers, numbers, dtype=torch.float64)
    side = torch.zeros(numbers, dtype=torch.float64)
    for one, path, part in zip(sets, paths, parts(sets), strict=True):
        slope = derivatives(one, recipe, path).double()
        d = distances(one, path.x[-1])
        weight = part * one.share / d * ((1 - MEAN) / d + MEAN / (one.share * d).sum())
        weighted = slope * (weight / (one.numbers * one.scale.square()))[:, None, None]
        off = (path.x[-1] - one.end).double().flatten()
        matrix += (weighted.flatten(0, 1).mT @ slope.flatten(0, 1)).cpu()
        side += (off @ weighted.flatten(0, 1)).cpu()
    slope = gains_slope(recipe, max(level.lam for level in sets[0].known))
    return matrix + noise * slope.mT @ slope, side + noise * slope.mT @ gains(recipe)
