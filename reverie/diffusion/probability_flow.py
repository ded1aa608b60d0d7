r"""The probability-flow ODE on a clock without singular ends: the angle.

With phi = arctan(sigma / alpha) and y = x_t / sqrt(alpha^2 + sigma^2) it is the same on every schedule,

    dy/dphi = v(y, phi) = cos(phi) E - sin(phi) D,                                                  (1)

alpha = 0 included, D and E being the denoiser's estimates of x_0 and eps at x_t.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3
    https://arxiv.org/abs/2011.13456
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), appendix D (the angle)
    https://arxiv.org/abs/2202.00512
"""

import math

import torch

from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Schedule


def angle(schedule: Schedule, t: Times) -> Times:
    """Return phi = arctan(sigma / alpha) (B,): 0 at the data, pi/2 where nothing is left of it."""
    alpha, sigma = schedule.marginal(t)
    return torch.atan2(sigma, alpha)


def time_of_angle(schedule: Schedule, phi: Times) -> Times:
    """Return the t (B,) at which phi has that value.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> time_of_angle(Flow(), torch.tensor([math.pi / 4, math.pi / 2], dtype=torch.float64)).float()
        tensor([0.5000, 1.0000])
    """
    return schedule.time(-2 * phi.clamp(max=math.pi / 2).tan().log()).clamp(max=1)


def velocity(denoiser: Denoiser, y: Data, phi: Times, condition: Condition | None, dtype: torch.dtype) -> Data:
    """Return v(y, phi) (B, *D) in y's dtype, the denoiser called in its own: equation (1)."""
    t = time_of_angle(denoiser.schedule, phi)
    alpha, sigma = denoiser.schedule.marginal(t)
    x = per_sample(torch.hypot(alpha, sigma), y) * y
    estimate = denoiser(x.to(dtype), t, condition)
    return per_sample(phi.cos(), y) * estimate.eps.to(y) - per_sample(phi.sin(), y) * estimate.x0.to(y)
