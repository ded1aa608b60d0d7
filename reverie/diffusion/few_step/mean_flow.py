r"""MeanFlow: a network for the average velocity over a span of time.

On the flow schedule, z_t = (1 - t) x_0 + t eps, the velocity v(z_t, t) is what moves now, and

    u(z_t, r, t) = 1 / (t - r) int_r^t v(z_s, s) ds                                                 (1)

what moves on average between r and t, so that z_r = z_t - (t - r) u in one step. By its derivative along the path,

    u(z_t, r, t) = v(z_t, t) - (t - r) du/dt,    du/dt = v . grad_z u + d_t u,                        (2)

and training asks for just that, with the sample's own velocity eps - x_0 for v:

    L = w |u - stop(eps - x_0 - (t - r) du/dt)|^2,    w = 1 / (stop mean|.|^2 + c).                   (3)

The network is told its time and the span t - r. A share of the spans is 0, which trains u(z_t, t, t) = v.

References:
    Mean Flows for One-step Generative Modeling (Geng et al., 2025), eq. 6, 8-11
    https://arxiv.org/abs/2505.13447
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.slopes import along
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Flow


def average_velocity(denoiser: Denoiser, x: Data, t: Times, span: Times, condition: Condition | None = None) -> Data:
    """Return u(x, t - span, t) (B, *D) of a denoiser that takes a span."""
    estimate = denoiser(x, t, {**(condition or {}), "span": span})
    return estimate.eps - estimate.x0


class MeanFlow(Objective):
    """MeanFlow's loss (3).

    Arguments:
        spans: The share of samples whose span is not 0.
        mean: Of ln(t / (1 - t)) of a span's other end; its own end is the time sampler's.
        std: Its standard deviation.
        constant: c of the weight. A small one is for images, whose errors are much alike; of points in few dimensions
            it draws the velocity away from its mean, and 10 is better.

    Raises:
        UsageError: A number is out of its range; on a call, the schedule is not `flow`.

    Example:
        >>> MeanFlow(spans=0.75).draws
        True
    """

    draws = True
    denoises = False

    def __init__(self, spans: float = 0.5, mean: float = -0.4, std: float = 1.0, constant: float = 1e-3) -> None:
        if not 0 < spans <= 1 or not std > 0 or not constant > 0:
            raise UsageError(
                f"spans is {spans}, std {std}, constant {constant}; each must be positive, spans at most 1"
            )
        self.spans, self.mean, self.std, self.constant = spans, mean, std, constant

    def ends(self, t: Times) -> tuple[Times, Times]:
        """Return both ends t >= r (B,) of each span: t and another time like it, or twice t; drawn by torch."""
        other = torch.sigmoid(self.mean + self.std * torch.randn(t.shape, dtype=t.dtype, device=t.device))
        other = torch.where(torch.rand(t.shape, dtype=t.dtype, device=t.device) < self.spans, other, t)
        return torch.maximum(t, other), torch.minimum(t, other)

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        t, r = self.ends(t)
        return self.loss(denoiser, x0, t, r, eps, condition)

    def loss(
        self, denoiser: Denoiser, x0: Data, t: Times, r: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        """Return the loss (B,) of spans from r to t (B,)."""
        u, aim = self.sides(denoiser, diffuse(denoiser.schedule, x0, t, eps), t, r, eps - x0, condition)
        error = (u - aim).square().flatten(1).mean(1)
        return error / (error.detach() + self.constant)

    def sides(
        self, denoiser: Denoiser, x: Data, t: Times, r: Times, v: Data, condition: Condition | None = None
    ) -> tuple[Data, Data]:
        """Return both sides of (2) (B, *D): u, and what it is to be, which has no gradient."""
        if not isinstance(denoiser.schedule, Flow):
            raise UsageError("MeanFlow needs the schedule flow, whose velocity is eps - x_0")

        def function(x: Data, t: Times, span: Times) -> Data:
            return average_velocity(denoiser, x, t, span, condition)

        one = torch.ones_like(t)
        u, slope = along(function, [x, t, t - r], [v, one, one])
        return u, (v - per_sample(t - r, v) * slope).detach()
