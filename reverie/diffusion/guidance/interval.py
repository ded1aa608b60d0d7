r"""Guidance within an interval of noise levels alone.

    D(x; s) = guided(x; s)    for s_low < s <= s_high,    plain(x; s) elsewhere,    s = sigma / alpha.     (1)

At high noise guidance narrows what can come, at low noise it changes little and costs as much as anywhere: on
ImageNet-512, EDM2-XXL's FID goes from 1.81 to 1.40 with guidance in the middle alone. Both denoisers are whole ones,
so that any guidance takes an interval, and outside of it only the plain one is called.

References:
    Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
    (Kynkaanniemi et al., 2024), eq. 5
    https://arxiv.org/abs/2404.07724
"""

import math

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample


class Interval(Denoiser):
    """A guided denoiser within an interval of noise levels, a plain one elsewhere: equation (1).

    Arguments:
        guided: With guidance, its condition bound to it.
        plain: Without, for the same rows: `Conditioned`.
        low: The noise level sigma / alpha above which there is guidance; 0 for no such bound.
        high: The noise level up to which there is guidance; inf for no such bound.

    Raises:
        UsageError: The bounds are not 0 <= low < high.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import EDM
        >>> one, two = (Mixture(torch.full((1, 2), m), torch.zeros(1), torch.ones(1), EDM()) for m in (1.0, 2.0))
        >>> at = Interval(two, one, low=0.3, high=2.0)(torch.zeros(3, 2), torch.tensor([0.1, 1.0, 10.0]).double() / 80)
        >>> at.x0[:, 0].tolist()
        [1.0, 2.0, 1.0]
    """

    def __init__(self, guided: Denoiser, plain: Denoiser, low: float = 0.0, high: float = math.inf) -> None:
        super().__init__()
        if not 0 <= low < high:
            raise UsageError(f"guidance from {low} to {high}; they must obey 0 <= low < high")
        self.guided, self.plain, self.schedule = guided, plain, plain.schedule
        self.low, self.high = low, high

    def inside(self, t: Times) -> Tensor:
        """Return which times (B,) lie within the interval."""
        level = -self.schedule.log_snr(t) / 2  # ln(sigma / alpha): no division by an alpha of 0
        low = math.log(self.low) if self.low > 0 else -math.inf
        return (level > low) & (level <= math.log(self.high))

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        inside = self.inside(t)
        if bool(inside.all()):
            return self.guided(x, t, condition)
        if not bool(inside.any()):
            return self.plain(x, t, condition)
        # Conditions are bound to rows, so that both are asked for all of them.
        a, b, within = self.guided(x, t, condition), self.plain(x, t, condition), per_sample(inside, x) > 0
        return Estimate(torch.where(within, a.x0, b.x0), torch.where(within, a.eps, b.eps), a.fraction)


class During(Interval):
    """As `Interval`, the bounds being times: guidance for low < t <= high.

    Arguments:
        guided: With guidance, its condition bound to it.
        plain: Without, for the same rows.
        low: The time above which there is guidance.
        high: The time up to which there is guidance.

    Raises:
        UsageError: The bounds are not 0 <= low < high.
    """

    def inside(self, t: Times) -> Tensor:
        return (t > self.low) & (t <= self.high)
