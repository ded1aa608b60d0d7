r"""Reflow: straighter paths, by training on the pairs that a teacher makes.

A teacher's probability-flow ODE takes noise eps to data x_0(eps). Trained on these pairs instead of on
independent ones,

    L = w(t) E d(F(x_t, t), p x_0(eps) + q eps),    x_t = alpha_t x_0(eps) + sigma_t eps,            (1)

the student's paths are straighter in (alpha, sigma), and where they are straight, one step of DDIM (Euler's, on
the flow schedule) is exact: then x_0(eps) = x_0 for all x_t of a path, and (1) is 0.

References:
    Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow (Liu et al., 2023), section 2
    https://arxiv.org/abs/2209.03003
"""

from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.common import Solver, ode_step
from reverie.diffusion.grids import Grid, angle
from reverie.diffusion.objectives import Objective, Simple
from reverie.diffusion.predictions import Data, per_sample


class Reflow(Objective):
    """Reflow's loss (1). The data is not looked at: the pairs are the teacher's.

    Arguments:
        teacher: Whose pairs they are.
        inner: The loss on them.
        steps: Steps of the teacher's ODE, on the grid of equal angles.
        solver: euler or heun.

    Raises:
        UsageError: There are no steps.

    Example:
        >>> import torch; from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> Reflow(point)(point, torch.zeros(1, 2), torch.tensor([0.5]).double(), torch.ones(1, 2))
        tensor([0.])
    """

    denoises = False

    def __init__(self, teacher: Denoiser, inner: Simple | None = None, steps: int = 8, solver: Solver = "heun") -> None:
        if steps < 1:
            raise UsageError(f"steps is {steps}; the teacher takes at least 1")
        self.teacher, self.inner, self.steps, self.solver = teacher, inner or Simple("velocity"), steps, solver

    @property
    def grid(self) -> Grid:
        """The times of the teacher's steps."""
        return angle(self.teacher.schedule, self.steps)

    def partner(self, eps: Data, condition: Condition | None = None) -> Data:
        """Return x_0(eps) (B, *D): where the teacher's ODE takes noise (B, *D)."""
        times = self.grid.to(eps.device).expand(len(eps), -1)
        x = per_sample(self.teacher.schedule.prior_std(times[:, 0]), eps) * eps
        for k in range(self.steps):
            x = ode_step(self.teacher, x, times[:, k], times[:, k + 1], condition, self.solver)
        return x

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        return self.inner(denoiser, self.partner(eps, condition), t, eps, condition)
