r"""What a network's output means: the one conversion between eps, x0, v, score and velocity.

Every prediction in use is a linear blend of the data and the noise,

    F = p x_0 + q eps,                                                                              (1)

and the noisy sample is another, x = alpha x_0 + sigma eps. The two equations give both back:

    x_0 = (q x - sigma F) / (alpha q - sigma p),    eps = (alpha F - p x) / (alpha q - sigma p).     (2)

A prediction is thus a pair (p, q), functions of alpha and sigma; to decode is (2), to encode is (1),
and each class writes (2) with its common factors cancelled, so that it holds at alpha = 0 and sigma = 0
wherever the prediction has a meaning there.

References:
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), section 4
    https://arxiv.org/abs/2202.00512
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.schedules import Schedule

Data = Float[Tensor, "b *d"]
PerSample = Float[Tensor, "*b"]


def per_sample(value: Tensor, like: Data) -> Tensor:
    """View one number per sample (B,) so that it broadcasts over data (B, *D), in the data's dtype."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Pair(NamedTuple):
    """The clean data and the noise that together make up a noisy sample: x = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor


class Decoding(NamedTuple):
    """Equation (2) as numbers: x_0 = x0_x x + x0_f F, eps = eps_x x + eps_f F."""

    x0_x: Tensor
    x0_f: Tensor
    eps_x: Tensor
    eps_f: Tensor


class Prediction(ABC):
    """The meaning of a network's output, and the scale and clock of its input.

    Example:
        >>> alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
        >>> x0, eps = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> v = V().encode(x0, eps, alpha, sigma)
        >>> V().decode(v, 0.8 * x0 + 0.6 * eps, alpha, sigma)
        Pair(x0=tensor([[1.]]), eps=tensor([[2.]]))

    `at_zero_signal` says whether the output still tells x_0 where alpha = 0.
    """

    name: str
    at_zero_signal: bool = True

    @abstractmethod
    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        """Return (p, q) of equation (1), one for each sample."""

    @abstractmethod
    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        """Return the four coefficients of equation (2), one of each for each sample."""

    def encode(self, x0: Data, eps: Data, alpha: PerSample, sigma: PerSample) -> Data:
        """Return F (B, *D) for data and noise: equation (1), a network's target."""
        p, q = self.blend(alpha, sigma)
        return per_sample(p, x0) * x0 + per_sample(q, x0) * eps

    def decode(self, output: Data, x: Data, alpha: PerSample, sigma: PerSample) -> Pair:
        """Return the data and the noise, each (B, *D), that an output F at x stands for: equation (2)."""
        a, b, c, d = (per_sample(value, x) for value in self.decoding(alpha, sigma))
        return Pair(torch.addcmul(a * x, b, output), torch.addcmul(c * x, d, output))

    def input_scale(self, alpha: PerSample, sigma: PerSample) -> Tensor:
        """Return the factor on x before it enters the network, c_in."""
        return torch.ones_like(alpha)

    def inputs(self, x: Data, alpha: PerSample, sigma: PerSample) -> Data:
        """Return x (B, *D) as it enters the network: c_in x."""
        return x

    def clock(self, schedule: Schedule, t: PerSample) -> Tensor:
        """Return the time as the network is given it: the schedule's timestep."""
        return schedule.timestep(t)


class Eps(Prediction):
    """The noise: p = 0, q = 1. Has no meaning where alpha = 0."""

    name = "eps"
    at_zero_signal = False

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        return Decoding(1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha))

    def decode(self, output: Data, x: Data, alpha: PerSample, sigma: PerSample) -> Pair:
        return Pair(torch.addcmul(x, per_sample(-sigma, x), output) / per_sample(alpha, x), output)


class X0(Prediction):
    """The clean data: p = 1, q = 0. The noise it implies has no meaning where sigma = 0."""

    name = "x0"

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        return Decoding(torch.zeros_like(alpha), torch.ones_like(alpha), 1 / sigma, -alpha / sigma)

    def decode(self, output: Data, x: Data, alpha: PerSample, sigma: PerSample) -> Pair:
        return Pair(output, torch.addcmul(x, per_sample(-alpha, x), output) / per_sample(sigma, x))


class V(Prediction):
    """v = alpha eps - sigma x_0: p = -sigma, q = alpha, sound at both ends."""

    name = "v"

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        return -sigma, alpha

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        total = alpha.square() + sigma.square()
        return Decoding(alpha / total, -sigma / total, sigma / total, alpha / total)


class Score(Prediction):
    """The score of the noisy data, grad ln p_t(x) = -eps / sigma: p = 0, q = -1 / sigma."""

    name = "score"
    at_zero_signal = False

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), -1 / sigma

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        return Decoding(1 / alpha, sigma.square() / alpha, torch.zeros_like(alpha), -sigma)


class Velocity(Prediction):
    """Rectified flow's velocity u = eps - x_0: p = -1, q = 1, sound at both ends."""

    name = "velocity"

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        total = alpha + sigma
        return Decoding(1 / total, -sigma / total, 1 / total, alpha / total)


class EDMOutput(Prediction):
    r"""EDM's F, whose target and input have unit variance: with s = sigma / alpha,

        D = c_skip x / alpha + c_out F,    c_skip = d^2 / (s^2 + d^2),    c_out = s d / sqrt(s^2 + d^2),

    and the network sees c_in x / alpha, c_in = 1 / sqrt(s^2 + d^2). Its clock, ln(s) / 4, is infinite where
    alpha = 0.

    Arguments:
        sigma_data: The data's standard deviation d.

    Raises:
        UsageError: sigma_data is not positive.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1
        https://arxiv.org/abs/2206.00364
    """

    name = "edm"
    at_zero_signal = False

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise UsageError(f"sigma_data is {sigma_data}; it must be positive")
        self.sigma_data = sigma_data

    def norm(self, alpha: PerSample, sigma: PerSample) -> Tensor:
        """Return the standard deviation of x: sqrt(alpha^2 d^2 + sigma^2)."""
        return ((alpha * self.sigma_data).square() + sigma.square()).sqrt()

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        norm = self.norm(alpha, sigma)
        return sigma / (self.sigma_data * norm), -alpha * self.sigma_data / norm

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        norm = self.norm(alpha, sigma)
        skip = alpha * self.sigma_data**2 / norm.square()
        return Decoding(skip, sigma * self.sigma_data / norm, sigma / norm.square(), -alpha * self.sigma_data / norm)

    def input_scale(self, alpha: PerSample, sigma: PerSample) -> Tensor:
        return 1 / self.norm(alpha, sigma)

    def inputs(self, x: Data, alpha: PerSample, sigma: PerSample) -> Data:
        return x * per_sample(self.input_scale(alpha, sigma), x)

    def clock(self, schedule: Schedule, t: PerSample) -> Tensor:
        """Return c_noise = ln(sigma / alpha) / 4."""
        return -schedule.log_snr(t) / 8


class ConsistencyOutput(EDMOutput):
    r"""EDM's F with the boundary at the least noise instead of at none: with s = sigma / alpha and its least s_1,

        f = c_skip x / alpha + c_out F,  c_skip = d^2 / ((s - s_1)^2 + d^2),  c_out = d (s - s_1) / sqrt(s^2 + d^2),

    so that f = x / alpha at s_1 for any network. Input and clock are EDM's, and with s_1 = 0 all of it is.

    Arguments:
        sigma_data: The data's standard deviation d.
        sigma_min: s_1.

    Raises:
        UsageError: sigma_data is not positive, or sigma_min below 0.

    References:
        Consistency Models (Song et al., 2023), appendix C
        https://arxiv.org/abs/2303.01469
    """

    name = "consistency"

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002) -> None:
        super().__init__(sigma_data)
        if not sigma_min >= 0:
            raise UsageError(f"sigma_min is {sigma_min}; it must be at least 0")
        self.sigma_min = sigma_min

    def scales(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out."""
        ratio, d = sigma / alpha, self.sigma_data
        above = ratio - self.sigma_min
        return d**2 / (above.square() + d**2), d * above / (ratio.square() + d**2).sqrt()

    def blend(self, alpha: PerSample, sigma: PerSample) -> tuple[Tensor, Tensor]:
        skip, out = self.scales(alpha, sigma)
        return (1 - skip) / out, -skip * sigma / (alpha * out)

    def decoding(self, alpha: PerSample, sigma: PerSample) -> Decoding:
        skip, out = self.scales(alpha, sigma)
        return Decoding(skip / alpha, out, (1 - skip) / sigma, -alpha * out / sigma)
