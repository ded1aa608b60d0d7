r"""Ancestral sampling: denoising diffusion probabilistic models (DDPM).

    x_s = a D + b x_t + sqrt(variance) z,                                                           (1)

where D = E[x_0 | x_t], and a, b and the small variance are those of the posterior q(x_s | x_t, x_0)
(process.py, eq. 3). No noise enters the last step, the one that ends at t = 0, and none but that one.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 2
    https://arxiv.org/abs/2006.11239
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 15
    https://arxiv.org/abs/2102.09672
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.levels import marginal
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.process import Posterior, posterior_between
from reverie.diffusion.samplers.base import Sampler, State, Step, ask

Variance = Literal["small", "large", "learned"]


@dataclass(frozen=True)
class DDPM(Sampler):
    r"""DDPM's ancestral sampler.

    Arguments:
        variance: small, the posterior's own; large, the step's; learned, between them as the network says.

    Raises:
        UsageError: The variance has another name, or is to be learned and the model learned none.

    Example:
        >>> DDPM(variance="large").stochastic
        True
    """

    variance: Variance = "small"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise UsageError(f"variance is {self.variance!r}; it must be small, large or learned")

    @property
    def stochastic(self) -> bool:
        return True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        estimate, s = ask(denoiser, state.x, state.t), step.s
        q = posterior_between(marginal(step.there), marginal(step.here))
        mean = q.mean(estimate.x0, state.x)
        if bool((s == 0).all()):
            return replace(state, x=mean, x0=estimate.x0)
        std = torch.where(per_sample(s, mean) > 0, self.std(q, estimate), 0)
        return replace(state, x=mean + std * noise.like(mean, state.k + 1), x0=estimate.x0)

    def std(self, q: Posterior, estimate: Estimate) -> Tensor:
        """Return the standard deviation of the noise, broadcastable to (B, *D)."""
        if self.variance != "learned":
            return per_sample(q.small if self.variance == "small" else q.large, estimate.x0).sqrt()
        return (learned_log_variance(q, estimate) / 2).exp()


def learned_log_variance(q: Posterior, estimate: Estimate) -> Tensor:
    """Return f ln large + (1 - f) ln small (B, *D), f being the network's fraction."""
    if estimate.fraction is None:
        raise UsageError("variance is 'learned', but this model learned none; use small or large")
    large = per_sample(q.large.log(), estimate.x0)
    small = per_sample(q.small.log(), estimate.x0)
    return estimate.fraction * large + (1 - estimate.fraction) * small
