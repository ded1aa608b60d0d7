r"""Loss weights: how much each noise level counts.

A weight here multiplies the squared error of a network's own output F = p x_0 + q eps. As the error of
F is the error of x_0 times |p - q alpha / sigma|, weights stated for another target are converted
through it: a squared error of x_0 weighed by w is one of eps weighed by w / snr.

References:
    Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023)
    https://arxiv.org/abs/2303.09556
    Perception Prioritized Training of Diffusion Models (Choi et al., 2022)
    https://arxiv.org/abs/2204.00227
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
    https://arxiv.org/abs/2206.00364
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.predictions import PerSample, Prediction


class Weight(ABC):
    """The weight of a time, for a given target; finite where alpha = 0, but for EDM's on eps or score."""

    @abstractmethod
    def __call__(self, target: Prediction, alpha: PerSample, sigma: PerSample) -> Tensor:
        """Return the weight (B,) of the squared error of that target at these noise levels."""


def x0_weight_to(target: Prediction, weight: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight of a target's squared error that equals a weight of x_0's.

    At a fixed x the errors obey alpha dx0 = -sigma deps, so dF = p dx0 + q deps = (p - q alpha / sigma) dx0.
    """
    p, q = target.blend(alpha, sigma)
    return weight * (sigma / (p * sigma - q * alpha)).square()


def eps_weight_to(target: Prediction, weight: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight of a target's squared error that equals a weight of eps's, in the limit where alpha = 0."""
    alpha = alpha.clamp(min=torch.finfo(alpha.dtype).tiny)
    p, q = target.blend(alpha, sigma)
    return weight * (alpha / (p * sigma - q * alpha)).square()


class Uniform(Weight):
    """The same for all: L_simple for the target at hand."""

    def __call__(self, target: Prediction, alpha: PerSample, sigma: PerSample) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(snr, gamma) on the error of x_0, so min(snr, gamma) / snr on that of eps.

    Arguments:
        gamma: The largest weight; 5 in the paper.

    Example:
        >>> from reverie.diffusion.predictions import Eps
        >>> MinSNR()(Eps(), torch.tensor([0.8]), torch.tensor([0.08]))  # snr = 100
        tensor([0.0500])
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise UsageError(f"min-SNR's gamma is {self.gamma}; it must be positive")

    def __call__(self, target: Prediction, alpha: PerSample, sigma: PerSample) -> Tensor:
        snr = (alpha / sigma).square()
        return eps_weight_to(target, (self.gamma / snr).clamp(max=1), alpha, sigma)


@dataclass(frozen=True)
class P2(Weight):
    """1 / (k + snr)^gamma on the error of eps.

    Arguments:
        gamma: How strongly low noise is damped; 1 in the paper.
        k: Keeps the weight finite; 1 in the paper.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if not self.k > 0 or not self.gamma >= 0:
            raise UsageError(f"P2's k is {self.k} and gamma {self.gamma}; k must be positive, gamma at least 0")

    def __call__(self, target: Prediction, alpha: PerSample, sigma: PerSample) -> Tensor:
        snr = (alpha / sigma).square()
        return eps_weight_to(target, (self.k + snr) ** -self.gamma, alpha, sigma)


@dataclass(frozen=True)
class EDMWeight(Weight):
    """(s^2 + d^2) / (s d)^2 on the error of x_0, s = sigma / alpha: uniform on EDM's own output.

    Arguments:
        sigma_data: The data's standard deviation d.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise UsageError(f"sigma_data is {self.sigma_data}; it must be positive")

    def __call__(self, target: Prediction, alpha: PerSample, sigma: PerSample) -> Tensor:
        snr = (alpha / sigma).square()
        return x0_weight_to(target, snr + 1 / self.sigma_data**2, alpha, sigma)
