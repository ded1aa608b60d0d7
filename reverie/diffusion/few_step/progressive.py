r"""Progressive distillation: a student whose one step is two of its teacher's.

Of a student of N steps at the times t_i = i / N, the teacher takes two steps of DDIM, from t = t_i over
t_i - 1 / 2N to s = t_(i-1), and arrives at x_s. The student's step arrives there if its data estimate is

    x~ = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t),                  (1)
    L = max(alpha_t^2 / sigma_t^2, 1) mean (x_0(x_t, t) - x~)^2.                                     (2)

The student then is the teacher of the next, of N / 2 steps. On a table the times are its entries, as in the grid
`trailing`, on which the student is sampled.

References:
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), algorithm 2, eq. 9
    https://arxiv.org/abs/2202.00512
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.common import ode_step
from reverie.diffusion.grids import check_steps, trailing
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Schedule


class Progressive(Objective):
    """The loss (2) of a student of N steps. Training times choose among its N.

    Arguments:
        teacher: Who takes two steps for each of the student's.
        steps: The student's, N.

    Raises:
        UsageError: There are no steps, or the teacher's table has not twice as many entries.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> Progressive(point, 4)(point, torch.ones(1, 2), torch.tensor([0.5]).double(), torch.ones(1, 2))
        tensor([0.])
    """

    denoises = False

    def __init__(self, teacher: Denoiser, steps: int) -> None:
        check_steps(teacher.schedule, 2 * steps)
        check_steps(teacher.schedule, steps)
        self.teacher, self.steps = teacher, steps

    def times(self, schedule: Schedule, t: Times) -> tuple[Times, Times, Times]:
        """Return where a student's step begins, its middle and its end (B,), for the step that t (B,) is in."""
        grid = trailing(schedule, 2 * self.steps).flip(0).to(t.device)
        i = torch.searchsorted(grid[::2].contiguous(), t.double(), right=False).clamp(1, self.steps)
        return grid[2 * i], grid[2 * i - 1], grid[2 * i - 2]

    def aim(self, x: Data, t: Times, middle: Times, s: Times, condition: Condition | None) -> Data:
        """Return x~ (B, *D) of (1)."""
        schedule = self.teacher.schedule
        halfway = ode_step(self.teacher, x, t, middle, condition, "euler")
        arrived = ode_step(self.teacher, halfway, middle, s, condition, "euler")
        (alpha, sigma), (alpha_s, sigma_s) = schedule.marginal(t), schedule.marginal(s)
        ratio = sigma_s / sigma
        return (arrived - per_sample(ratio, x) * x) / per_sample(alpha_s - ratio * alpha, x)

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        schedule = denoiser.schedule
        t, middle, s = self.times(schedule, t)
        x = diffuse(schedule, x0, t, eps)
        aim = self.aim(x, t, middle, s, condition)
        alpha, sigma = schedule.marginal(t)
        error = (denoiser(x, t, condition).x0 - aim).square().flatten(1).mean(1)
        return (alpha / sigma).square().clamp(min=1).to(error) * error
