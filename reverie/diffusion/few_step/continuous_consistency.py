r"""Consistency in continuous time (sCM): the limit of a gap that closes, on the angle.

With phi = arctan(sigma / alpha), y = x / sqrt(alpha^2 + sigma^2) = cos(phi) x_0 + sin(phi) eps, and
F = cos(phi) E - sin(phi) D the network's velocity there (a v-prediction's output), the consistency function is

    f(y, phi) = cos(phi) y - sin(phi) F(y, phi),                                                    (1)

with f(y, 0) = y. Its slope along the path, dy/dphi being the sample's own velocity cos(phi) eps - sin(phi) x_0
or the teacher's, times cos(phi), is

    g = -cos^2(phi) (F - dy/dphi) - w cos(phi) sin(phi) (y + dF/dphi),                              (2)

where w = 1; training lets it rise from 0. It is normalised, and the loss has the gradient -g dF:

    g <- g / (rms(g) + c),    L = mean (F - stop(F) - g)^2.                                         (3)

The paper has TrigFlow, where the data is scaled to unit variance; here its scale is left as it is, and any
schedule and prediction will do: the angle is the same on all.

References:
    Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models (Lu & Song, 2024), eq. 6-8, algorithm 1
    https://arxiv.org/abs/2410.11081
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.slopes import along
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.probability_flow import angle, velocity


class ContinuousConsistency(Objective):
    """sCM's loss (3).

    Arguments:
        warmup: Steps over which w of (2) rises from 0 to 1.
        teacher: Whose ODE is distilled; None for consistency training.
        constant: c of (3): the larger, the less is normalised. The paper's 0.1 is for the length of g, which is the
            root of its size times longer than its rms.

    Raises:
        UsageError: A number is out of its range.

    Example:
        >>> objective = ContinuousConsistency(warmup=10); objective.begin(5); objective.share
        0.5
    """

    denoises = False

    def __init__(self, warmup: int = 1000, teacher: Denoiser | None = None, constant: float = 0.002) -> None:
        if warmup < 0 or not constant > 0:
            raise UsageError(f"warmup is {warmup} and constant {constant}; they must be at least 0, and above 0")
        self.warmup, self.teacher, self.constant = warmup, teacher, constant
        self.share = 1.0 if warmup == 0 else 0.0

    def begin(self, step: int) -> None:
        self.share = min(1.0, step / self.warmup) if self.warmup else 1.0

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        phi = angle(denoiser.schedule, t.clamp(min=denoiser.schedule.t_min))
        cos, sin = per_sample(phi.cos(), x0), per_sample(phi.sin(), x0)
        y = cos * x0 + sin * eps
        if self.teacher is None:
            way = cos * eps - sin * x0
        else:
            with torch.no_grad():
                way = velocity(self.teacher, y, phi, condition, y.dtype)
        output, tangent = self.tangent(denoiser, y, phi, way, condition)
        return (output - output.detach() - tangent).square().flatten(1).mean(1)

    def tangent(
        self, denoiser: Denoiser, y: Data, phi: Times, way: Data, condition: Condition | None
    ) -> tuple[Data, Data]:
        """Return F (B, *D), and g of (3), which has no gradient."""

        def function(y: Data, phi: Times) -> Data:
            return velocity(denoiser, y, phi, condition, y.dtype)

        cos, sin = per_sample(phi.cos(), y), per_sample(phi.sin(), y)
        # Along cos sin dphi rather than dphi: what is multiplied by it afterwards may not fit its number format.
        output, slope = along(function, [y, phi], [cos * sin * way, phi.cos() * phi.sin()])
        held = output.detach()
        g = -cos.square() * (held - way) - self.share * (cos * sin * y + slope)
        size = per_sample(g.flatten(1).square().mean(1).sqrt(), g)
        return output, g / (size + self.constant)
