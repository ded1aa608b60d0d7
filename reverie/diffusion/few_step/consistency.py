r"""Consistency models on a grid of noise levels: distillation (CD) and improved training (iCT).

On levels s_1 < ... < s_N (s = sigma / alpha, Karras' spacing), x_t at s_(n+1) and r at s_n,

    L = w d(f(x_t, t), stop f(x_r, r)),    w = 1 / (s_(n+1) - s_n),                                 (1)
    x_r = a step of the teacher's ODE from x_t                                      (distillation), (2)
    x_r = alpha_r x_0 + sigma_r eps, of the same eps                                    (training), (3)
    N = min(s0 2^floor(step / K'), s1) + 1,  K' = floor(steps / (floor(log2(s1 / s0)) + 1)).        (4)

The time sampler's t chooses the pair of levels around it: with s log-normal this is the discretised
log-normal of the second paper. The lowest level counts as `boundary`, where f is x / alpha by the form of
the prediction: 0, but for predictions.ConsistencyOutput. The first paper distils with w = 1, which leaves
what all else rests on, the lowest levels, to be learned last.

References:
    Consistency Models (Song et al., 2023), algorithms 2 and 3
    https://arxiv.org/abs/2303.01469
    Improved Techniques for Training Consistency Models (Song & Dhariwal, 2024), section 3
    https://arxiv.org/abs/2310.14189
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.common import (
    HUBER,
    Solver,
    both,
    check_width,
    consistency,
    distance,
    gap,
    held,
    noise_ratio,
    ode_step,
    time_of_ratio,
)
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Schedule

HIGHEST = 80.0  # s_N, of a schedule that goes beyond it


def karras_levels(schedule: Schedule, count: int, boundary: float = 0.0, rho: float = 7.0) -> Float[Tensor, " n"]:
    """Return the levels s_1 < ... < s_N (count,), the first of them the boundary.

    Example:
        >>> from reverie.diffusion.schedules import EDM
        >>> [round(s, 2) for s in karras_levels(EDM(), 4).tolist()]
        [0.0, 0.47, 9.72, 80.0]
    """
    ends = noise_ratio(schedule, torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)).clamp(max=HIGHEST)
    low, high = (ends ** (1 / rho)).tolist()
    levels = torch.linspace(low, high, count, dtype=torch.float64) ** rho
    levels[0] = boundary
    return levels


def doubling(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """Return N at a step of `steps` in all: equation (4).

    Example:
        >>> [doubling(step, 800) for step in (0, 100, 799)]
        [11, 21, 1281]
    """
    each = max(1, steps // (math.floor(math.log2(last / first)) + 1))
    return int(min(first * 2 ** min(step // each, 64), last)) + 1


class Consistency(Objective):
    """Consistency distillation (2) of a teacher, or without one improved consistency training (3).

    Arguments:
        steps: Training steps in all, over which N doubles; without effect on distillation, whose N is `last` + 1.
        teacher: Whose ODE is distilled; None for none.
        first: Intervals at the start, of training.
        last: Intervals at the end.
        solver: The teacher's step: euler or heun.
        boundary: The lowest level, where f(x) = x / alpha.
        width: c of the distance (common.py, eq. 2).
        target: The network that makes the target; None for the one that is trained.

    Raises:
        UsageError: A number is out of its range, or the teacher is on another schedule.

    Example:
        >>> Consistency(steps=800).count
        11
    """

    denoises = False

    def __init__(
        self,
        steps: int = 1,
        teacher: Denoiser | None = None,
        first: int = 10,
        last: int | None = None,
        solver: Solver = "heun",
        boundary: float = 0.0,
        width: float = HUBER,
        target: Denoiser | None = None,
    ) -> None:
        last = (18 if teacher else 1280) if last is None else last
        if steps < 1 or first < 1 or last < (1 if teacher else first):
            raise UsageError(
                f"steps is {steps}, first {first}, last {last}; each must be at least 1, last at least first"
            )
        if not boundary >= 0:
            raise UsageError(f"the boundary is {boundary}; it must be at least 0")
        check_width(width)
        self.steps, self.first, self.last, self.solver = steps, first, last, solver
        self.boundary, self.width, self.teacher, self.target = boundary, width, teacher, target
        self.count = 0
        self.begin(0)

    def begin(self, step: int) -> None:
        self.count = self.last + 1 if self.teacher else doubling(step, self.steps, self.first, self.last)

    def pair(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        """Return the times (B,) of the levels above and below those of t (B,)."""
        levels = karras_levels(schedule, self.count, self.boundary).to(t.device)
        times = time_of_ratio(schedule, levels)
        above = torch.searchsorted(levels, noise_ratio(schedule, t), right=True).clamp(1, len(levels) - 1)
        return times[above], times[above - 1]

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        schedule = denoiser.schedule
        t, r = self.pair(schedule, t)
        x = diffuse(schedule, x0, t, eps)
        if self.teacher:
            earlier = ode_step(self.teacher, x, t, r, condition, self.solver)
        else:
            earlier = diffuse(schedule, x0, r, eps)
        loss = self.compare(denoiser, x, t, earlier, r, condition)
        return loss / gap(schedule, t, r).to(loss)

    def compare(
        self, denoiser: Denoiser, x: Data, t: Times, earlier: Data, r: Times, condition: Condition | None
    ) -> Float[Tensor, " b"]:
        """Return the distance (B,) between f at x, t and at an earlier place on the path."""
        student, target = both(
            lambda: consistency(denoiser, x, t, condition),
            lambda: held(self.target or denoiser, earlier, r, condition),
            x.device,
        )
        return distance(student, target, self.width)
