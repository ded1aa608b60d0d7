r"""Walks of a fitted solver from where exact trajectories start, and how their ends move with each of its numbers.

The derivatives are carried along the walk, in forward mode; how an estimate changes with x is a difference of two,
unless the denoiser says it itself. So nothing is differentiated by a graph, and any denoiser will do, guided or
clipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import ends
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import ask
from reverie.diffusion.samplers.learned import Recipe, factors
from reverie.diffusion.trajectories import Trajectories

NUDGE = 1e-5  # in lambda, or in a weight, for derivatives of what is known to rounding
GAP = 0.02  # the least step, in lambda


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


def of_lambdas(recipe: Recipe) -> Int[Tensor, " n"]:
    """Return where a recipe's lambdas are among its numbers."""
    sizes = torch.tensor([len(row) + 2 for row in recipe.weights])
    return sizes.cumsum(0) - sizes


def room(lam: Float[Tensor, " n"], like: Recipe, bounds: Bounds) -> Float[Tensor, " m"]:
    """Return how much room lambdas have: the first to its bound, each to the one before, and the last to its bound."""
    first = lam[:1] - min(like.lam[0], bounds.least)
    between = lam.clamp(min=bounds.least).diff() - GAP
    return torch.cat([first, between, bounds.most - lam[-1:]])


def joined(numbers: int, places: Int[Tensor, " n"], stuck: Bool[Tensor, " m"]) -> Float[Tensor, "p q"]:
    """Return the ways that a recipe's numbers may move, where there is no room left at some of its lambdas.

    Arguments:
        numbers: How many numbers it has.
        places: Which of them are lambdas.
        stuck: Where there is none, as `room` has it (N + 1,).

    Example:
        >>> joined(4, torch.tensor([0, 3]), torch.tensor([False, True, False])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        >>> joined(4, torch.tensor([0, 3]), torch.tensor([True, False, False])).shape
        torch.Size([4, 3])
    """
    axes, group = torch.eye(numbers, dtype=torch.float64), (~stuck).cumsum(0)
    others = torch.ones(numbers, dtype=torch.bool).index_fill(0, places, False)
    # Of a group that touches neither bound: those have the first label and the last.
    together = [axes[places[group[:-1] == one]].sum(0) for one in range(1, int(group[-1]))]
    return torch.cat([axes[others], *(one[None] for one in together)]).mT


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
