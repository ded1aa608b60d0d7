r"""Easy consistency tuning (ECT): a diffusion model becomes a consistency model by shrinking a gap.

With s = sigma / alpha, and x_t, x_r made of the same x_0 and eps,

    L = w d(f(x_t, t), stop f(x_r, r)),    w = 1 / (s_t - s_r),                                     (1)
    s_r / s_t = max(0, 1 - q^-(a + 1) n(s_t)),    n(s) = 1 + k sigmoid(-b s),                       (2)
    a = floor(stages step / steps).                                                                 (3)

The larger a, the nearer r is to t. With r = 0 the target is x_0 itself and (1) trains a diffusion model, but
for its distance; with r -> t it trains the map along the probability-flow ODE. The boundary f(x, 0) = x is that of
any prediction but x0, so that the student is the teacher, weights, schedule and prediction, tuned.

References:
    Consistency Models Made Easy (Geng et al., 2024), section 3 and appendix
    https://arxiv.org/abs/2406.14548
"""

from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.common import (
    HUBER,
    both,
    check_width,
    consistency,
    distance,
    gap,
    held,
    noise_ratio,
    time_of_ratio,
)
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Schedule


class EasyConsistency(Objective):
    """ECT's loss (1).

    Arguments:
        steps: Training steps in all, over which the gap shrinks.
        stages: How often it does: the number of values of a.
        q: By what factor it shrinks each time.
        k: How much wider it is at little noise.
        b: How quickly that ends as the noise grows.
        width: c of the distance (common.py, eq. 2).
        target: The network that makes the target; None for the one that is trained.

    Raises:
        UsageError: A number is out of its range.

    Example:
        >>> import torch; from reverie.diffusion.schedules import EDM
        >>> tuning = EasyConsistency(steps=800)
        >>> t = torch.tensor([1.0], dtype=torch.float64)
        >>> for step in (0, 799): tuning.begin(step); print(round(80 * tuning.earlier(EDM(), t).item(), 4))
        40.0
        79.6875
    """

    denoises = False

    def __init__(
        self,
        steps: int,
        stages: int = 8,
        q: float = 2.0,
        k: float = 8.0,
        b: float = 1.0,
        width: float = HUBER,
        target: Denoiser | None = None,
    ) -> None:
        if steps < 1 or stages < 1:
            raise UsageError(f"steps is {steps} and stages {stages}; each must be at least 1")
        if not q > 1 or not k >= 0 or not b >= 0:
            raise UsageError(f"q is {q}, k {k} and b {b}; q must be above 1, k and b at least 0")
        check_width(width)
        self.steps, self.stages, self.q, self.k, self.b, self.width = steps, stages, q, k, b, width
        self.target = target
        self.stage = 0

    def begin(self, step: int) -> None:
        self.stage = min(self.stages * step // self.steps, self.stages - 1)

    def earlier(self, schedule: Schedule, t: Times) -> Times:
        """Return r (B,) for t (B,), 0 where it is earlier than the schedule's first time: equation (2)."""
        s = noise_ratio(schedule, t)
        share = 1 - self.q ** -(self.stage + 1) * (1 + self.k * (-self.b * s).sigmoid())
        r = time_of_ratio(schedule, s * share.clamp(min=0))
        return r.where(r >= schedule.t_min, 0)

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        schedule, r = denoiser.schedule, self.earlier(denoiser.schedule, t)
        student, target = both(
            lambda: consistency(denoiser, diffuse(schedule, x0, t, eps), t, condition),
            lambda: held(self.target or denoiser, diffuse(schedule, x0, r, eps), r, condition),
            x0.device,
        )
        return distance(student, target, self.width) / gap(schedule, t, r).to(student)
