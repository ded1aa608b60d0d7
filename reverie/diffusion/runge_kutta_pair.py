r"""Embedded Runge-Kutta pairs: an ODE's solution and its own error, each sample at its own step.

For dy/du = f(u, y), a step of length h has the stages

    k_i = f(u + c_i h, y + h sum_(j < i) a_ij k_j),                                                 (1)

the result y + h sum_i b_i k_i, of order p, and the error h sum_i e_i k_i, its difference to a second result of
order p - 1 from the same stages. A step is taken where the error, in units of what is tolerated,

    r = norm(error / (atol + rtol max(|y|, |y_new|))),                                              (2)

is at most 1; taken or not, the next one has h min(5, max(1/5, 0.9 r^(-1/p))). The last stage of both pairs is the
next step's first, so that a step that is taken costs one evaluation less than it has stages.

References:
    A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980), table 2
    https://doi.org/10.1016/0771-050X(80)90013-3
    A 3(2) pair of Runge-Kutta formulas (Bogacki & Shampine, 1989)
    https://doi.org/10.1016/0893-9659(89)90079-7
    Solving Ordinary Differential Equations I (Hairer, Norsett & Wanner, 1993), section II.4
    https://doi.org/10.1007/978-3-540-78862-1
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reverie.base.errors import NonFiniteError, UsageError
from reverie.diffusion.denoisers import Times
from reverie.diffusion.predictions import Data, per_sample

Field = Callable[[Tensor, Tensor], Tensor]  # (u (B,), y (B, *D)) -> dy/du (B, *D)
Norm = Callable[[Tensor], Tensor]  # (B, *D) -> (B,)


@dataclass(frozen=True)
class Pair:
    """An embedded pair, its last stage the next step's first.

    Arguments:
        nodes: c_2, c_3, ...; c_1 is 0 and the last is 1.
        rows: a_21; a_31, a_32; ...; the last row is b.
        error: e_1, e_2, ..., as many as there are stages.
        order: p, that of the result.
    """

    nodes: Sequence[float]
    rows: Sequence[Sequence[float]]
    error: Sequence[float]
    order: int


DORMAND_PRINCE = Pair(
    nodes=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    rows=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)
BOGACKI_SHAMPINE = Pair(
    nodes=(1 / 2, 3 / 4, 1),
    rows=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    order=3,
)


class Trial(NamedTuple):
    """A step that is yet to be judged: its result and error (B, *D), and f at its end, the next one's first stage."""

    y: Tensor
    error: Tensor
    slope: Tensor


class Solution(NamedTuple):
    """What `integrate` returns: y at the end (B, *D), how often each sample's f was called and how many of its steps
    were refused, both (B,)."""

    y: Tensor
    evaluations: Tensor
    rejected: Tensor


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each sample (B,)."""
    return x.flatten(1).double().square().mean(1).sqrt()


def blend(weights: Sequence[float], slopes: Sequence[Tensor], h: Tensor) -> Tensor:
    """Return h sum_i w_i k_i (B, *D), h one number for each sample."""
    return sum((per_sample(w * h, k) * k for w, k in zip(weights, slopes, strict=True) if w), 0 * slopes[0])


def trial(pair: Pair, f: Field, u: Times, y: Data, h: Times, slope: Data) -> Trial:
    """Return a step of length h (B,) from (u, y), where f is known to be slope: equation (1)."""
    slopes, moved = [slope], y
    for node, row in zip(pair.nodes, pair.rows, strict=True):
        moved = y + blend(row, slopes, h)
        slopes.append(f(u + node * h, moved))
    return Trial(moved, blend(pair.error, slopes, h), slopes[-1])


def severity(y: Data, new: Trial, rtol: float, atol: float, norm: Norm = rms) -> Times:
    """Return r of (2) for each sample (B,): at most 1 where the step may be taken, NaN where it is not finite."""
    return norm(new.error / (atol + rtol * torch.maximum(y.abs(), new.y.abs())))


def growth(r: Times, order: int) -> Times:
    """Return by what factor (B,) a sample's next step is longer than its last, whose error was r.

    Example:
        >>> growth(torch.tensor([0.0, 1.0, torch.nan]), 5)
        tensor([5.0000, 0.9000, 0.2000])
    """
    return (0.9 * r ** (-1 / order)).nan_to_num(nan=0.2, posinf=5).clamp(0.2, 5)


def first_length(
    pair: Pair, f: Field, u: Times, y: Data, left: Times, slope: Data, rtol: float, atol: float, norm: Norm = rms
) -> Times:
    """Return a first step for each sample (B,), at most what is left, by one more call of f: section II.4 of Hairer."""
    scale = atol + rtol * y.abs()
    size, speed = norm(y / scale), norm(slope / scale)
    h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).minimum(left.abs())
    bend = norm((f(u + left.sign() * h, y + per_sample(left.sign() * h, y) * slope) - slope) / scale) / h
    most = torch.maximum(speed, bend)
    second = torch.where(most > 1e-15, (0.01 / most) ** (1 / pair.order), torch.clamp(1e-3 * h, min=1e-6))
    return left.sign() * torch.minimum(100 * h, second).minimum(left.abs())


def integrate(
    f: Field,
    y: Data,
    a: Times | float,
    b: Times | float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    *,
    pair: Pair = DORMAND_PRINCE,
    norm: Norm = rms,
    first: float | None = None,
    max_steps: int = 1000,
) -> Solution:
    """Return dy/du = f(u, y) solved from u = a to u = b, forwards or backwards, with steps for each sample by itself.

    Arguments:
        f: (u (B,) float64, y (B, *D)) -> dy/du (B, *D), row by row. Rows that have arrived are evaluated on, at b.
        y: Where it starts (B, *D).
        a: From where, (B,) or one for all.
        b: To where, (B,) or one for all.
        rtol: The error of a step that is tolerated, relative to |y|.
        atol: And the one that is tolerated beside it.
        pair: Which Runge-Kutta pair.
        norm: Sums up a sample's error in units of what is tolerated.
        first: The first step's length; chosen by one more evaluation where none is given.
        max_steps: Steps that may be tried, refused ones among them.

    Raises:
        UsageError: A tolerance or another number is out of its range, or can't be reached: steps became too small, or
            more than max_steps.
        NonFiniteError: f is NaN or infinite, and stays so on ever smaller steps.

    Example:
        >>> start = torch.ones(1, 2, dtype=torch.float64)
        >>> bool((integrate(lambda u, y: -y, start, 0, 2).y - math.exp(-2)).abs().max() < 1e-5)
        True
    """
    check(y.dtype, rtol, atol, first, max_steps)
    u, end = (torch.as_tensor(v, dtype=torch.float64, device=y.device).expand(len(y)) for v in (a, b))
    least = 16 * torch.finfo(torch.float64).eps * torch.maximum(u.abs(), end.abs())
    slope = f(u, y)
    refuse_non_finite(slope.flatten(1).isfinite().all(1), u)
    way = (end - u).sign()
    h = first_length(pair, f, u, y, end - u, slope, rtol, atol, norm) if first is None else first * way
    evaluations = torch.full_like(u, 2 if first is None else 1, dtype=torch.int64)
    rejected = torch.zeros_like(evaluations)
    for _ in range(max_steps):
        left = end - u
        active = left != 0
        if not bool(active.any()):
            return Solution(y, evaluations, rejected)
        last = ~(h.abs() < left.abs())
        h = torch.where(last, left, h)
        new = trial(pair, f, u, y, h, slope)
        r = severity(y, new, rtol, atol, norm)
        taken = active & (r <= 1)
        row = taken.reshape(-1, *[1] * (y.ndim - 1))
        y, slope = torch.where(row, new.y, y), torch.where(row, new.slope, slope)
        u = torch.where(taken, torch.where(last, end, u + h), u)
        evaluations, rejected = evaluations + active * len(pair.nodes), rejected + (active & ~taken)
        h = h * growth(r, pair.order)
        stuck = active & ~taken & (h.abs() <= least)
        refuse_non_finite(~stuck | r.isfinite(), u)
        refuse_stuck(stuck, u, "steps became too small to be counted")
    refuse_stuck(u != end, u, f"{max_steps} steps did not reach the end; raise max_steps")
    return Solution(y, evaluations, rejected)


def check(dtype: torch.dtype, rtol: float, atol: float, first: float | None, max_steps: int) -> None:
    """Refuse tolerances that the numbers can't hold, and steps that there are not."""
    least = 10 * torch.finfo(dtype).eps
    if not (math.isfinite(rtol + atol) and rtol >= least and atol > 0):
        raise UsageError(f"rtol is {rtol:g} and atol {atol:g}; in {dtype} rtol is at least {least:.2g}, atol positive")
    if max_steps < 1 or (first is not None and not (math.isfinite(first) and first > 0)):
        raise UsageError(f"first is {first} and max_steps {max_steps}; both must be positive")


def refuse_non_finite(fine: Tensor, u: Times) -> None:
    """Raise NonFiniteError where a row (B,) is not fine, saying which and where."""
    if not bool(fine.all()):
        row = int((~fine).nonzero()[0])
        raise NonFiniteError(
            f"the ODE is not finite at u = {u[row].item():.6g} in sample {row}, and {int((~fine).sum()) - 1} others; "
            "the model's weights, its dtype or the data are at fault"
        )


def refuse_stuck(stuck: Tensor, u: Times, why: str) -> None:
    """Raise UsageError where a row (B,) is stuck, saying which, where and why."""
    if bool(stuck.any()):
        row = int(stuck.nonzero()[0])
        raise UsageError(
            f"the ODE is not solved: {why} (sample {row} at u = {u[row].item():.6g}); loosen rtol and atol, "
            "or use a smoother model"
        )
