r"""Which times training looks at: uniform, EDM's log-normal, or by importance.

Draws are a function of (seed, step), so that a resumed run sees the times that the uninterrupted one
would have seen. Times within a batch are stratified: sample i of B takes its u from [i/B, (i+1)/B) in a
random order, which leaves every sample uniform and the batch's mean loss less noisy.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (stratified times)
    https://arxiv.org/abs/2107.00630
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 18 (importance)
    https://arxiv.org/abs/2102.09672
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.randomness import generator
from reverie.diffusion.denoisers import Times
from reverie.diffusion.schedules import EDM, Schedule, Table

LEVELS = 10  # noise levels at which a loss is looked at


class Draw(NamedTuple):
    """Times (B,) in float64, and the factor (B,) that makes their losses' mean unbiased."""

    t: Tensor
    factor: Tensor


def stratified(count: int, *key: int | str) -> Float[Tensor, " n"]:
    """Return numbers (count,) in [0, 1), float64, one from each of `count` equal strata, in random order.

    Example:
        >>> sorted((4 * stratified(4, 0, "time", 7)).int().tolist())
        [0, 1, 2, 3]
    """
    random = generator(*key)
    return torch.from_numpy((random.permutation(count) + random.random(count)) / count)


class TimeSampler(ABC):
    """A distribution over times; `state` holds what it has learned, for the checkpoint."""

    @abstractmethod
    def __call__(self, count: int, *key: int | str) -> Draw:
        """Return `count` times fixed by the key."""

    def learn(self, t: Times, loss: Float[Tensor, " b"]) -> None:  # noqa: B027 - most learn nothing
        """Take note of the losses (B,) at times t (B,)."""

    def state(self) -> dict[str, Tensor]:
        """Return what has been learned."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what was learned before."""
        if state:
            raise ModelFileError(f"this time sampler learns nothing, yet the checkpoint holds {sorted(state)}")


class UniformTimes(TimeSampler):
    """Uniform times: a table's timesteps, each as likely, or [t_min, 1] of a continuous schedule.

    Arguments:
        schedule: The noise schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.last = schedule.timesteps - 1 if isinstance(schedule, Table) else 0

    def __call__(self, count: int, *key: int | str) -> Draw:
        u = stratified(count, *key)
        return Draw(self.times(u), torch.ones_like(u))

    def times(self, u: Tensor) -> Tensor:
        """Return the times at quantiles u (B,)."""
        if isinstance(self.schedule, Table):
            return self.schedule.time_of_timestep((u * self.schedule.timesteps).floor().clamp(max=self.last))
        return self.schedule.t_min + u * (1 - self.schedule.t_min)


class LogNormalTimes(TimeSampler):
    """EDM's: ln(sigma / alpha) from N(mean, std^2), kept within the schedule's range.

    Arguments:
        schedule: The noise schedule.
        mean: -1.2 in EDM, -0.4 in EDM2 on latents.
        std: 1.2 in EDM, 1.0 in EDM2.
    """

    def __init__(self, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> None:
        if not std > 0:
            raise UsageError(f"the log-normal's std is {std}; it must be positive")
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, count: int, *key: int | str) -> Draw:
        t = self.at(stratified(count, *key).clamp(1e-9, 1 - 1e-9))
        return Draw(t, torch.ones_like(t))

    def at(self, u: Times) -> Times:
        """Return the times at quantiles u (B,) in (0, 1)."""
        level = self.mean + self.std * torch.special.ndtri(u)
        t = self.schedule.time(-2 * level).clamp(self.schedule.t_min, 1)
        if isinstance(self.schedule, Table):
            t = self.schedule.time_of_timestep(self.schedule.timestep(t).round())
        return t


class ImportanceTimes(TimeSampler):
    r"""Times drawn where the loss is large: p(t) proportional to sqrt(E[L_t^2]), weighed back by 1 / p(t).

    The expectation is over the last `history` losses of each bin; until every bin has that many, times
    are uniform. A table has a bin for each timestep, or fewer.

    Arguments:
        schedule: The noise schedule.
        bins: Equal bins of t, a divisor of a table's entries; 100 where none is given, or the next divisor below.
        history: Losses kept for each bin.
        floor: The share of times that stay uniform.

    Raises:
        UsageError: A number out of its range.
    """

    def __init__(self, schedule: Schedule, bins: int | None = None, history: int = 10, floor: float = 0.001) -> None:
        self.uniform = UniformTimes(schedule)
        entries = schedule.timesteps if isinstance(schedule, Table) else None
        if bins is None:
            bins = next(n for n in range(100, 0, -1) if (entries or 100) % n == 0)
        if bins < 1 or (entries and entries % bins):
            rule = f"divide the table's {entries} entries" if entries else "be at least 1"
            raise UsageError(f"bins is {bins}; it must {rule}")
        if history < 1 or not 0 <= floor <= 1:
            raise UsageError(f"history is {history} and floor {floor}; they must be at least 1, and within [0, 1]")
        self.schedule, self.floor = schedule, floor
        self.losses = torch.zeros(bins, history, dtype=torch.float64)
        self.counts = torch.zeros(bins, dtype=torch.int64)

    @property
    def probabilities(self) -> Float[Tensor, " n"]:
        """The probability of each bin."""
        bins = len(self.counts)
        if bool((self.counts < self.losses.shape[1]).any()):
            return torch.full((bins,), 1 / bins, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - self.floor) * size / size.sum().clamp(min=1e-300) + self.floor / bins

    def __call__(self, count: int, *key: int | str) -> Draw:
        probabilities = self.probabilities
        edges = probabilities.cumsum(0)
        u = stratified(count, *key) * edges[-1]
        index = torch.searchsorted(edges, u, right=True).clamp(max=len(edges) - 1)
        within = ((u - (edges[index] - probabilities[index])) / probabilities[index]).clamp(0, 1 - 1e-12)
        t = self.uniform.times((index + within) / len(edges))
        return Draw(t, 1 / (len(edges) * probabilities[index]))

    def bin(self, t: Times) -> Tensor:
        """Return the bin (B,) of each time."""
        least = 0.0 if isinstance(self.schedule, Table) else self.schedule.t_min
        u = (t.double().cpu() - least) / (1 - least)
        width = 0.5 / self.schedule.timesteps if isinstance(self.schedule, Table) else 0.0
        return ((u - width) * len(self.counts)).floor().long().clamp(0, len(self.counts) - 1)

    def learn(self, t: Times, loss: Float[Tensor, " b"]) -> None:
        for i, value in zip(self.bin(t).tolist(), loss.detach().double().cpu().tolist(), strict=True):
            if not math.isfinite(value):
                continue  # a step that is skipped; kept, it would make every probability NaN
            self.losses[i] = self.losses[i].roll(-1)
            self.losses[i, -1] = value
            self.counts[i] += 1

    def state(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        mine = {name: value.shape for name, value in self.state().items()}
        if {name: value.shape for name, value in state.items()} != mine:
            raise ModelFileError(
                "the checkpoint's importance sampler is of another shape; keep bins and history as they were"
            )
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


# Fixed times -------------------------------------------------------------------------------------


def level_times(schedule: Schedule, levels: int = LEVELS) -> Float[Tensor, " n"]:
    """Return the middle of each of `levels` equal parts of time (levels,), on a table its nearest entry.

    On EDM's schedule the parts are equal in probability under its own distribution of training times.
    """
    t = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    if isinstance(schedule, EDM):  # whose t is the noise level: most of it is noise alone; these are where it trains
        return LogNormalTimes(schedule).at(t)
    return schedule.time_of_timestep(schedule.timestep(t).round()) if isinstance(schedule, Table) else t
