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
graph, and any denoiser will do, guided or clipped; a round costs about 3.5 N^2 evaluations of each sample for N steps.

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
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import NonFiniteError
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import ends
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import ask
from reverie.diffusion.samplers.learned import Recipe, factors
from reverie.diffusion.trajectories import Trajectories

TYPICAL = 0.1  # f of (1), in medians of the squared error
NUDGE = 1e-5  # in lambda, or in a weight, for derivatives of what is known to rounding
FLOOR = 1e-14  # added to squared errors before their logarithm is taken
GAP = 0.02  # the least step, in lambda
TRIES = 6  # dampings that a round tries
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


class Bounds(NamedTuple):
    """What the lambdas of all steps but the first are above, and that of the last at most."""

    least: float
    most: float

    @staticmethod
    def of(one: Trajectories) -> "Bounds":
        """Return those of a set's schedule and grid."""
        return Bounds(ends(one.denoiser.schedule)[0] / 2, max(level.lam for level in one.known))


def follow(one: Trajectories, recipe: Recipe) -> Path:
    """Return the walk of a recipe from where a set's trajectories start."""
    known = recipe_levels(one, recipe)
    xs, estimates = [begun(one, known[0].t)], []
    for k, row in enumerate(recipe.weights):
        estimates.append(estimate(one.denoiser, xs[-1], known[k]))
        keep, gain = recipe.factors(k, known[k], known[k + 1])
        xs.append(keep * xs[-1] + gain * blend(row, estimates))
    return Path(xs, estimates)


def begun(one: Trajectories, t: float) -> Data:
    """Return the noise that a set's trajectories start from, as noise alone at time t."""
    first, own = one.denoiser.schedule.prior_std(torch.tensor([t, 1.0], dtype=torch.float64)).tolist()
    return one.x[0] * (first / own)


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
    for k, row in enumerate(recipe.weights):
        estimates.append(z / (1 + rho[k] ** 2) + errors[k])
        share = rho[k + 1] / rho[k]
        z = share * (recipe.kept[k] if k + 1 < n else 0.0) * z + (1 - share) * blend(row, estimates)
    return z


def gains_slope(recipe: Recipe, bounds: Bounds) -> Float[Tensor, "n p"]:
    """Return how the gains change with each of the recipe's numbers, by differences."""
    theta, here = pack(recipe), gains(recipe)
    axes = torch.eye(len(theta), dtype=torch.float64)
    moved = [gains(unpack(theta + NUDGE * axis, recipe, bounds)) for axis in axes]
    return (torch.stack(moved, 1) - here[:, None]) / NUDGE


# The numbers of a recipe, in the order in which they come into play ----------------------------------


def pack(recipe: Recipe) -> Float[Tensor, " p"]:
    """Return a recipe's numbers: of each step its lambda, its weights, and what it keeps."""
    kept = [*((f,) for f in recipe.kept), ()]
    numbers = [[lam, *row, *keep] for lam, row, keep in zip(recipe.lam, recipe.weights, kept, strict=True)]
    return torch.tensor([value for part in numbers for value in part], dtype=torch.float64)


def unpack(theta: Float[Tensor, " p"], like: Recipe, bounds: Bounds) -> Recipe:
    """Return the recipe of these numbers, its lambdas moved apart and between the bounds where they aren't."""
    left, lam = theta.tolist(), list[float]()
    rows, kept = list[tuple[float, ...]](), list[float]()
    for k, row in enumerate(like.weights):
        due = min(left.pop(0), bounds.most - GAP * (like.steps - 1 - k))
        # The first may stay at t = 1, of which nothing says where it is in lambda.
        above = max(lam[-1], bounds.least) + GAP if lam else min(like.lam[0], bounds.least)
        lam.append(max(due, above))
        rows.append(tuple(left.pop(0) for _ in row))
        kept += [left.pop(0)] if k + 1 < like.steps else []
    return Recipe(tuple(lam), tuple(rows), tuple(kept))


# Derivatives ------------------------------------------------------------------------------------


def derivatives(one: Trajectories, recipe: Recipe, path: Path) -> Float[Tensor, "m n p"]:
    """Return how the last state (M, n) changes with each of the recipe's numbers (P)."""
    known, numbers = recipe_levels(one, recipe), len(pack(recipe))
    x = path.x[0].flatten(1)
    moved = torch.zeros(*x.shape, numbers, dtype=x.dtype, device=x.device)
    moved[..., 0] = beginning_change(one, known[0]).flatten(1)
    told: list[Tensor] = []  # of the last estimates, for the numbers that came before each
    before, past_used = 1, max(len(row) for row in recipe.weights)
    for k, row in enumerate(recipe.weights):
        here, there, after = known[k], known[k + 1], before + len(row)
        change = along(one.denoiser, path.x[k], here, moved[..., :before])
        change[..., -1] += with_lambda(one.denoiser, path.x[k], here, path.estimates[k])  # its own is the last of them
        told = [*told, change][-past_used:]
        keep, gain = recipe.factors(k, here, there)
        past, state = path.estimates[: k + 1], path.x[k].flatten(1)
        total = blend(row, past).flatten(1)
        moved[..., :before] *= keep
        for c, estimate_moved in zip(row, reversed(told), strict=False):
            moved[..., : estimate_moved.shape[-1]].add_(estimate_moved, alpha=gain * c)
        moved[..., before - 1] += factor_change(one, recipe, k, known, k, state, total)
        for j in range(len(row)):
            moved[..., before + j] = gain * past[-1 - j].flatten(1)
        if k + 1 < recipe.steps:
            moved[..., after] = factors(here, there)[0] * state
            moved[..., after + 1] = factor_change(one, recipe, k, known, k + 1, state, total)
        before = after + 2
    return moved


def along(denoiser: Denoiser, x: Data, level: Level, moves: Float[Tensor, "m n p"]) -> Float[Tensor, "m n p"]:
    """Return how the estimate changes as x moves along each of some directions."""
    if math.isinf(level.lam):  # there is nothing of the data in x
        return torch.zeros_like(moves)
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
    if math.isinf(level.lam):  # nor does t = 1 change with it
        return torch.zeros_like(here).flatten(1)
    first, size = level.t == 1, nudge(x)
    (near,) = at_lambda(denoiser, [level.lam + (size if first else -size)])  # before t = 1 there is none
    return (here - estimate(denoiser, x, near)).flatten(1) / (-size if first else size)


def beginning_change(one: Trajectories, first: Level) -> Data:
    """Return how the noise that a walk begins with changes with the first lambda."""
    if math.isinf(first.lam):
        return torch.zeros_like(one.x[0])
    near, far = at_lambda(one.denoiser, [first.lam, first.lam + NUDGE])
    return (begun(one, far.t) - begun(one, near.t)) / NUDGE


def at_lambda(denoiser: Denoiser, lam: Sequence[float]) -> list[Level]:
    """Return the levels at some lambdas."""
    schedule = denoiser.schedule
    return levels(schedule, schedule.time(2 * torch.tensor(lam, dtype=torch.float64)).clamp(max=1).tolist())


def factor_change(
    one: Trajectories, recipe: Recipe, k: int, known: Sequence[Level], of: int, x: Tensor, total: Tensor
) -> Tensor:
    """Return how what step k makes of x and its estimates' sum, being what they are, changes with one lambda: that
    which it begins at, k, or that which it ends at, k + 1."""
    if math.isinf(known[of].lam):  # as at t = 1
        return torch.zeros_like(x)
    low, high = at_lambda(one.denoiser, [known[of].lam + size for size in (-NUDGE, NUDGE)])
    two = [recipe.factors(k, *(level if j == of else known[j] for j in (k, k + 1))) for level in (low, high)]
    keep, gain = ((b - a) / (high.lam - low.lam) for a, b in zip(*two, strict=True))
    return keep * x + gain * total


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
    bounds, damping = Bounds.of(sets[0]), 1e-2
    paths = [follow(one, recipe) for one in sets]
    best = measure(sets, recipe, paths, aim)
    for done in range(1, rounds + 1):
        found = None
        normal, gradient = equations(sets, recipe, paths, aim)
        for _ in range(TRIES):
            damped = normal + torch.diag(damping * normal.diagonal() + 1e-12 * normal.diagonal().max())
            tried = unpack(pack(recipe) - torch.linalg.solve(damped, gradient), recipe, bounds)
            found = attempt(sets, tried, aim)
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
