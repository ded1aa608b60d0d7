r"""Levels: what a schedule says of one time, as plain numbers.

Samplers and their coefficients live on the clock

    lambda = ln(alpha / sigma),    rho = sigma / alpha = exp(-lambda),                               (1)

and need both ends of a step, for each sample, as numbers to reckon with. They are looked up here: each
time of a schedule is worked out once, in float64, and remembered, so that a step asks no device for them.

References:
    DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), section 3
    https://arxiv.org/abs/2206.00927
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reverie.diffusion.schedules import Marginal, Schedule

REMEMBERED = 100_000  # times of one schedule, before it starts again


class Level(NamedTuple):
    """A schedule at one time.

    Arguments:
        t: The time, in [0, 1].
        alpha: The scale of the data.
        sigma: The scale of the noise.
        lam: lambda = ln(alpha / sigma): inf at t = 0, -inf where nothing of the data is left.
        timestep: The time in the units that networks are given.
    """

    t: float
    alpha: float
    sigma: float
    lam: float
    timestep: float

    @property
    def rho(self) -> float:
        """sigma / alpha."""
        return self.sigma / self.alpha if self.alpha else math.inf


_known: "WeakKeyDictionary[Schedule, dict[float, Level]]" = WeakKeyDictionary()


def levels(schedule: Schedule, times: Sequence[float]) -> list[Level]:
    """Return the level of each time.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> [level.rho for level in levels(Flow(), [0.5, 0.0])]
        [1.0, 0.0]
    """
    known = _known.setdefault(schedule, {})
    if missing := [t for t in dict.fromkeys(times) if t not in known]:
        if len(known) + len(missing) > REMEMBERED:
            known.clear()
            missing = list(dict.fromkeys(times))
        known.update(zip(missing, compute(schedule, missing), strict=True))
    return [known[t] for t in times]


def compute(schedule: Schedule, times: Sequence[float]) -> list[Level]:
    """Return the level of each time, worked out."""
    with torch.no_grad():
        t = torch.tensor(times, dtype=torch.float64)
        alpha, sigma = schedule.marginal(t)
        rows = (
            times,
            alpha.tolist(),
            sigma.tolist(),
            (schedule.log_snr(t) / 2).tolist(),
            schedule.timestep(t).tolist(),
        )
    return [Level(*row) for row in zip(*rows, strict=True)]


def marginal(known: Sequence[Level]) -> Marginal:
    """Return alpha and sigma of some levels as tensors (B,), float64."""
    alpha, sigma = ([getattr(level, name) for level in known] for name in ("alpha", "sigma"))
    return Marginal(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))


def time_of(schedule: Schedule, lam: Sequence[float]) -> list[float]:
    """Return the times at which lambda has these values, within [0, 1]."""
    times = schedule.time(2 * torch.tensor(lam, dtype=torch.float64))
    return times.clamp(0, 1).tolist()


def weighted(terms: Sequence[tuple[Sequence[float], Tensor]]) -> Tensor:
    """Return sum_i w_i x_i, with one weight for each sample.

    Arguments:
        terms: Weights (B) and data (B, *D) of each term, at least one; a term whose weights are all 0 is left out.

    Example:
        >>> weighted([([2.0], torch.ones(1, 3)), ([0.5], torch.ones(1, 3))])
        tensor([[2.5000, 2.5000, 2.5000]])
    """
    kept = [(tuple(weights), x) for weights, x in terms if any(weights)] or [(tuple(terms[0][0]), terms[0][1])]
    like = kept[0][1]
    scales = columns(tuple(weights for weights, _ in kept), like.dtype, like.device, like.ndim)
    total = like * scales[0]
    for scale, (_, x) in zip(scales[1:], kept[1:], strict=True):
        total = torch.addcmul(total, scale, x)
    return total


@lru_cache(maxsize=4096)
def columns(
    rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device, ndim: int
) -> tuple[Tensor, ...]:
    """Return each row of numbers, one for each sample, so that it broadcasts over data (B, *D) of ndim axes.

    They are remembered: a run of some steps asks for the same ones again and again.
    """
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.float64).to(device, dtype)
        return table.reshape(len(rows), -1, *[1] * (ndim - 1)).unbind()
