r"""Restart sampling: an ODE solver that now and then goes back up by adding much noise at once.

Where a step first ends at or below the level `low`, the sample is diffused from there back to `high`,
exactly, and brought down again in `inner` steps of Heun's rule, evenly spaced in ln rho; `times` times. The noise
contracts what errors have gathered, and the ODE in between adds few.

References:
    Restart Sampling for Improving Generative Processes (Xu et al., 2023), algorithm 1
    https://arxiv.org/abs/2306.14878
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import Level, levels, marginal, time_of, weighted
from reverie.diffusion.process import transition_between
from reverie.diffusion.samplers.base import State, Step
from reverie.diffusion.samplers.runge_kutta import Heun, where
from reverie.diffusion.schedules import Schedule

DRAWS = 1 << 20  # restarts draw noise beyond the steps' own numbers


@dataclass(frozen=True)
class Restart(Heun):
    """Heun's rule with restarts.

    Arguments:
        low: rho = sigma / alpha at or below which it goes back; the grid must end a step there, before t = 0.
        high: rho to which it goes back.
        times: How often.
        inner: Steps of Heun's rule from high to low.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> Restart(times=2, inner=3).stochastic
        True
    """

    low: float = 0.1
    high: float = 0.6
    times: int = 2
    inner: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low < self.high or self.times < 1 or self.inner < 1:
            raise UsageError(
                f"low, high, times, inner are {self.low}, {self.high}, {self.times}, {self.inner}; "
                "they must obey 0 < low < high, times >= 1, inner >= 1"
            )

    @property
    def stochastic(self) -> bool:
        return True

    def cost(self, here: Level, there: Level) -> int:
        return super().cost(here, there) + (2 * self.times * self.inner if self.crosses(here, there) else 0)

    def crosses(self, here: Level, there: Level) -> bool:
        """Return whether a step is followed by restarts; one to t = 0 has no level to go back from."""
        return here.rho > self.low >= there.rho > 0

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        moved = super().move(denoiser, state, step, noise)
        crossing = [self.crosses(a, b) for a, b in zip(step.here, step.there, strict=True)]
        if not any(crossing):
            return moved
        rungs = [self.ladder(denoiser.schedule, b) if ok else None for b, ok in zip(step.there, crossing, strict=True)]
        x = moved.x
        for again in range(self.times):
            z = noise.like(x, state.k + 1 + (again + 1) * DRAWS)
            x = self.descend(denoiser, replace(state, x=self.ascend(x, z, step, rungs)), step, rungs, noise)
        return replace(moved, x=where(crossing, x, moved.x))

    def ladder(self, schedule: Schedule, bottom: Level) -> list[Level]:
        """Return the levels from high down to where a step has ended, evenly spaced in ln rho."""
        top = -math.log(self.high)
        (end,) = levels(schedule, [1.0])
        top = max(top, end.lam)
        lam = [top + (bottom.lam - top) * i / self.inner for i in range(self.inner)]
        return [*levels(schedule, time_of(schedule, lam)), bottom]

    def ascend(self, x: Tensor, z: Tensor, step: Step, rungs: list[list[Level] | None]) -> Tensor:
        """Return x diffused from where a step has ended to the top of its ladder."""
        high = [rung[0] if rung else b for rung, b in zip(rungs, step.there, strict=True)]
        up = transition_between(marginal(step.there), marginal(high))
        return weighted([(up.alpha.tolist(), x), (up.variance.sqrt().tolist(), z)])

    def descend(
        self, denoiser: Denoiser, state: State, step: Step, rungs: list[list[Level] | None], noise: Noise
    ) -> Tensor:
        """Return x taken down its ladder. A sample without one is stepped along idly, for company."""
        for i in range(self.inner):
            here = [rung[i] if rung else a for rung, a in zip(rungs, step.here, strict=True)]
            there = [rung[i + 1] if rung else b for rung, b in zip(rungs, step.there, strict=True)]
            state = Heun().move(denoiser, state, replace(step, here=here, there=there), noise)
        return state.x
