r"""An adaptive solver of the probability-flow ODE: as many evaluations as its tolerance asks for.

Dormand and Prince's pair of order 5(4) on the angle (probability_flow.py, eq. 1), in ln(phi), each sample with
steps of its own. A step to t = 0 goes to the schedule's first time and ends with the data estimate there.

References:
    A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980)
    https://doi.org/10.1016/0771-050X(80)90013-3
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Times
from reverie.diffusion.levels import Level
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.probability_flow import angle, velocity
from reverie.diffusion.runge_kutta_pair import integrate
from reverie.diffusion.samplers.base import Sampler, State, Step, ask


@dataclass(frozen=True)
class Adaptive(Sampler):
    """The probability-flow ODE with error control; steps of the grid are where it reports, not what it computes.

    Arguments:
        rtol: The error of a step that is tolerated, relative to |y|.
        atol: And the one that is tolerated beside it.

    Raises:
        UsageError: A tolerance is not positive; on a step, it cannot be reached.

    Example:
        >>> Adaptive(rtol=1e-4).adaptive
        True
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rtol > 0 or not self.atol > 0:
            raise UsageError(f"rtol is {self.rtol} and atol {self.atol}; they must be positive")

    def cost(self, here: Level, there: Level) -> int:
        return 3

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        schedule = denoiser.schedule
        ends = torch.where(step.s > 0, step.s, torch.full_like(step.s, schedule.t_min)).minimum(state.t)
        x = self.solve(denoiser, state.x, state.t, ends)
        last = ask(denoiser, x, ends).x0
        final = (step.s == 0).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return replace(state, x=torch.where(final, last, x), x0=last)

    def solve(self, denoiser: Denoiser, x: Data, t: Times, s: Times) -> Data:
        """Return x at times s (B,), from where it is at times t (B,)."""
        t, s = t.to(x.device), s.to(x.device)
        sizes = [torch.hypot(*denoiser.schedule.marginal(time)) for time in (t, s)]
        begin, end = (angle(denoiser.schedule, time).log() for time in (t, s))

        def field(u: Times, y: Data) -> Data:
            return per_sample(u.exp(), y) * velocity(denoiser, y, u.exp(), None, y.dtype)

        y = integrate(field, x / per_sample(sizes[0], x), begin, end, self.rtol, self.atol).y
        return per_sample(sizes[1], y) * y
