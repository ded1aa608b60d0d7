r"""Noise schedules: how much of the data, and how much noise, there is at each time.

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I),    t in [0, 1],                               (1)

where t = 0 is the data (alpha = 1, sigma = 0) and t = 1 the noise. The same process as a stochastic
differential equation, dx = f x dt + g dw, has

    f = d ln alpha / dt,    g^2 = d sigma^2 / dt - 2 f sigma^2.                                      (2)

The logarithm of the signal-to-noise ratio, log_snr = 2 ln(alpha / sigma), is the clock that all
schedules share. Everything is computed in the dtype of t: give float64 to get float64.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
    https://arxiv.org/abs/2011.13456
    Variational Diffusion Models (Kingma et al., 2021)
    https://arxiv.org/abs/2107.00630
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from reverie.base.errors import UsageError
from reverie.base.registry import nearest

Time = Float[Tensor, "*b"]
MAX_FINITE = 1e30


def derivative(function: Callable[[Time], Tensor], t: Time) -> Time:
    """Return d function / dt for an elementwise function, itself differentiable if t is."""
    create = t.requires_grad and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        t = t if create else t.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(t).sum(), t, create_graph=create, materialize_grads=True)
    return slope


class Marginal(NamedTuple):
    """q(x_t | x_0) = N(alpha x_0, sigma^2): one of each per time."""

    alpha: Tensor
    sigma: Tensor


class Schedule(ABC):
    """A noise schedule, defined by ln alpha and sigma^2 as functions of t.

    Times are tensors of any shape; results have that shape and dtype. `t_min` is the least time at
    which a sampler need look: from there it goes to t = 0 in one step.

    Example:
        >>> schedule = Flow()
        >>> schedule.alpha(torch.tensor([0.25])), schedule.log_snr(torch.tensor([0.5]))
        (tensor([0.7500]), tensor([0.]))
    """

    t_min: float = 1e-3

    @abstractmethod
    def log_alpha(self, t: Time) -> Time:
        """Return ln alpha_t; -inf where nothing of the data is left."""

    @abstractmethod
    def variance(self, t: Time) -> Time:
        """Return sigma_t^2."""

    @abstractmethod
    def time(self, log_snr: Time) -> Time:
        """Return the t at which log_snr has that value: the inverse of `log_snr`."""

    def alpha(self, t: Time) -> Time:
        """Return alpha_t, the scale of the data, in [0, 1]."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Time:
        """Return sigma_t, the scale of the noise, at least 0."""
        return self.variance(t).sqrt()

    def marginal(self, t: Time) -> Marginal:
        """Return alpha_t and sigma_t together, which is cheaper than one by one."""
        return Marginal(self.alpha(t), self.sigma(t))

    def log_snr(self, t: Time) -> Time:
        """Return 2 ln(alpha_t / sigma_t): +inf at t = 0, decreasing."""
        return 2 * self.log_alpha(t) - self.variance(t).log()

    def drift(self, t: Time) -> Time:
        """Return f(t) of dx = f x dt + g dw (2)."""
        return derivative(self.log_alpha, t)

    def diffusion(self, t: Time) -> Time:
        """Return g(t) of dx = f x dt + g dw (2)."""
        return (derivative(self.variance, t) - 2 * self.drift(t) * self.variance(t)).clamp(min=0).sqrt()

    def timestep(self, t: Time) -> Time:
        """Return the time in the units that networks are given: 1000 t, or a table's index."""
        return 1000 * t

    def prior_std(self, t: Time) -> Time:
        """Return the standard deviation of the noise that sampling starts from at t."""
        return self.sigma(t)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing of the data is left at t = 1."""
        return bool(self.log_alpha(torch.ones(1, dtype=torch.float64)) == -math.inf)


class VariancePreserving(Schedule):
    """Schedules with alpha^2 + sigma^2 = 1, defined by ln alpha_bar = ln alpha^2 alone."""

    @abstractmethod
    def log_alpha_bar(self, t: Time) -> Time:
        """Return ln alpha_bar_t = ln alpha_t^2."""

    @abstractmethod
    def time_of_log_alpha_bar(self, value: Time) -> Time:
        """Return the t at which ln alpha_bar has that value."""

    def log_alpha(self, t: Time) -> Time:
        return self.log_alpha_bar(t) / 2

    def variance(self, t: Time) -> Time:
        return -torch.expm1(self.log_alpha_bar(t))

    def marginal(self, t: Time) -> Marginal:
        log_alpha_bar = self.log_alpha_bar(t)
        return Marginal((log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt())

    def time(self, log_snr: Time) -> Time:
        return self.time_of_log_alpha_bar(logsigmoid(log_snr))

    def diffusion(self, t: Time) -> Time:
        # With alpha^2 + sigma^2 = 1, equation (2) is g^2 = -d ln alpha_bar / dt: no difference of large terms.
        return (-2 * self.drift(t)).clamp(min=0).sqrt()

    def prior_std(self, t: Time) -> Time:
        # Data of unit variance stays so: what has been made of it at t has variance 1, not sigma^2.
        return torch.ones_like(t)


class VP(VariancePreserving):
    r"""The variance-preserving SDE: beta(t) = beta_min + t (beta_max - beta_min), ln alpha_bar = -int beta.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, eq. 11 and 33
        https://arxiv.org/abs/2011.13456
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise UsageError(f"beta_min is {beta_min} and beta_max {beta_max}; they must obey 0 < beta_min < beta_max")
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha_bar(self, t: Time) -> Time:
        return -t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def time_of_log_alpha_bar(self, value: Time) -> Time:
        # The quadratic's root in the form that does not cancel at small t.
        root = (self.beta_min**2 - 2 * (self.beta_max - self.beta_min) * value).sqrt()
        return -2 * value / (self.beta_min + root)


class SubVP(Schedule):
    r"""The sub-VP SDE: alpha as in VP, sigma = 1 - alpha^2, a smaller variance at every time.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, eq. 12 and appendix B
        https://arxiv.org/abs/2011.13456
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.vp = VP(beta_min, beta_max)

    def log_alpha(self, t: Time) -> Time:
        return self.vp.log_alpha(t)

    def variance(self, t: Time) -> Time:
        return self.vp.variance(t).square()

    def sigma(self, t: Time) -> Time:
        return self.vp.variance(t)

    def time(self, log_snr: Time) -> Time:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(-ln alpha), which does not cancel at small t.
        return self.vp.time_of_log_alpha_bar(-2 * ((-log_snr / 2).exp() / 2).asinh())


class VE(Schedule):
    r"""The variance-exploding SDE: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1).

    This is the exact marginal of dx = g dw with g = sigma_min (sigma_max / sigma_min)^t
    sqrt(2 ln(sigma_max / sigma_min)) started at the data; the paper's sigma_min (sigma_max / sigma_min)^t
    leaves out the last -1.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, eq. 9 and 30
        https://arxiv.org/abs/2011.13456
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UsageError(
                f"sigma_min is {sigma_min}, sigma_max {sigma_max}; they must obey 0 < sigma_min < sigma_max"
            )
        self.sigma_min, self.rate = sigma_min, 2 * math.log(sigma_max / sigma_min)
        self.t_min = math.log(2) / self.rate  # where sigma is sigma_min

    def log_alpha(self, t: Time) -> Time:
        return 0 * t

    def drift(self, t: Time) -> Time:
        return 0 * t

    def variance(self, t: Time) -> Time:
        return self.sigma_min**2 * torch.expm1(self.rate * t)

    def time(self, log_snr: Time) -> Time:
        return softplus(-log_snr - 2 * math.log(self.sigma_min), threshold=700) / self.rate


class EDM(Schedule):
    r"""EDM's schedule: alpha = 1, sigma = sigma_max t.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1
        https://arxiv.org/abs/2206.00364
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UsageError(
                f"sigma_min is {sigma_min}, sigma_max {sigma_max}; they must obey 0 < sigma_min < sigma_max"
            )
        self.sigma_max, self.t_min = sigma_max, sigma_min / sigma_max

    def log_alpha(self, t: Time) -> Time:
        return 0 * t

    def drift(self, t: Time) -> Time:
        return 0 * t

    def variance(self, t: Time) -> Time:
        return (self.sigma_max * t).square()

    def sigma(self, t: Time) -> Time:
        return self.sigma_max * t

    def time(self, log_snr: Time) -> Time:
        return (-log_snr / 2).exp() / self.sigma_max


class Flow(Schedule):
    r"""Rectified flow: alpha = 1 - t, sigma = t, a straight line from data to noise.

    References:
        Flow Straight and Fast (Liu et al., 2023)
        https://arxiv.org/abs/2209.03003
    """

    def log_alpha(self, t: Time) -> Time:
        return torch.log1p(-t)

    def variance(self, t: Time) -> Time:
        return t.square()

    def alpha(self, t: Time) -> Time:
        return 1 - t

    def sigma(self, t: Time) -> Time:
        return 1 * t

    def time(self, log_snr: Time) -> Time:
        return torch.sigmoid(-log_snr / 2)


class Cosine(VariancePreserving):
    r"""The cosine schedule in continuous time: alpha_bar = cos^2(a(t)) / cos^2(a(0)), a(t) = pi/2 (t + s) / (1 + s).

    At t = 1 nothing of the data is left; the table of the same name clips beta at 0.999 and keeps a little.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17
        https://arxiv.org/abs/2102.09672
    """

    def __init__(self, offset: float = 0.008) -> None:
        if not 0 <= offset < 1:
            raise UsageError(f"offset is {offset}; it must lie in [0, 1)")
        self.offset = offset
        self.rate = math.pi / 2 / (1 + offset)  # a(t) = a(0) + rate t
        self.cos, self.sin = math.cos(self.rate * offset), math.sin(self.rate * offset)  # of a(0)

    def log_alpha_bar(self, t: Time) -> Time:
        # Late, cos(a) is the sine of what is left to pi/2, exactly 0 at t = 1; early, cos(a) / cos(a(0)) is 1 less
        # a product, exactly 1 at t = 0. Each branch is fed times that it is sound at, lest its slope be NaN.
        late = t > 0.5
        left = self.rate * (1 - torch.where(late, t, 0.5))
        half = self.rate * torch.where(late, 0.5, t) / 2
        lost = 2 * (self.rate * self.offset + half).sin() * half.sin() / self.cos
        return 2 * torch.where(late, left.sin().log() - math.log(self.cos), torch.log1p(-lost))

    def time_of_log_alpha_bar(self, value: Time) -> Time:
        # sin and cos of a(t) - a(0), the sine rationalised so that it does not cancel at small t.
        variance = -torch.expm1(value)
        cosine = (value / 2).exp() * self.cos
        sine = (self.sin**2 + self.cos**2 * variance).sqrt()
        tiny = torch.finfo(value.dtype).tiny
        rise = self.cos**2 * variance / (sine * self.cos + cosine * self.sin).clamp(min=tiny)
        return (torch.atan2(rise, cosine * self.cos + sine * self.sin) / self.rate).clamp(max=1)


class Table(VariancePreserving):
    r"""A table of betas: alpha_bar_i = prod_(j <= i) (1 - beta_j), at its integer timesteps i = 0 .. T - 1.

    Timestep i lies at t = (i + 1) / T, so that t = 0 is the data. Between its entries the table is
    interpolated in log_snr; before the first, ln alpha_bar is linear in t (a constant beta); and where the
    last entry is 0 (zero terminal SNR), alpha falls to it linearly.

    Arguments:
        betas: The table (T,), each in (0, 1), the last one at most 1.

    Raises:
        UsageError: A beta out of that range; the message says which.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 2-4
        https://arxiv.org/abs/2006.11239

    Example:
        >>> table = Table(linear_betas(1000))
        >>> bool((table.alpha(torch.tensor([1 / 1000], dtype=torch.float64)) ** 2 - (1 - 1e-4)).abs() < 1e-15)
        True
    """

    def __init__(self, betas: Float[Tensor, " n"]) -> None:
        self.betas = check_betas(torch.as_tensor(betas, dtype=torch.float64).clone())
        self.log_alpha_bars = torch.log1p(-self.betas).cumsum(0)
        self.first = self.log_alpha_bars[0].item()
        self.log_snrs = self.log_alpha_bars - torch.log(-torch.expm1(self.log_alpha_bars))
        self.slopes = self.log_snrs.diff().clamp(min=-MAX_FINITE)
        self.ends_at_zero = bool(self.betas[-1] == 1)
        self.t_min = 1 / len(betas)

    @property
    def timesteps(self) -> int:
        """The number of entries, T."""
        return len(self.betas)

    def timestep(self, t: Time) -> Time:
        return self.place(t) - 1

    def time_of_timestep(self, timestep: Tensor) -> Time:
        """Return t = (i + 1) / T in float64."""
        return (timestep.to(torch.float64) + 1) / self.timesteps

    def place(self, t: Time) -> Time:
        """Return T t, where a time that is an entry's up to rounding is that entry's exactly."""
        place = self.timesteps * t
        exact = place.detach()
        gap = exact - exact.round()
        return place - gap * (gap.abs() <= 4 * torch.finfo(t.dtype).eps * self.timesteps)

    def log_alpha_bar(self, t: Time) -> Time:
        place = self.place(t)
        low = place.detach().floor().clamp(1, self.timesteps - 1)
        index = low.long() - 1
        log_snr = self.log_snrs.to(t.device)[index] + (place - low) * self.slopes.to(t.device)[index]
        result = torch.where(place < 1, self.first * place, logsigmoid(log_snr).to(t.dtype))
        if not self.ends_at_zero:
            return result
        falling = 2 * (self.timesteps - place).clamp(max=1).log() + self.log_alpha_bars[-2].item()
        return torch.where(place > self.timesteps - 1, falling, result)

    def time_of_log_alpha_bar(self, value: Time) -> Time:
        log_snr = value - torch.log(-torch.expm1(value))
        return self.time(log_snr)

    def time(self, log_snr: Time) -> Time:
        falling = -self.log_snrs.to(log_snr.device)
        wide = log_snr.to(torch.float64)
        index = torch.searchsorted(falling, -wide.detach(), right=True).clamp(1, self.timesteps - 1) - 1
        left, right = falling[index], falling[index + 1]
        place = index + 1 + ((-wide - left) / (right - left)).clamp(max=1)
        log_alpha_bar = logsigmoid(wide)
        place = torch.where(-wide < falling[0], log_alpha_bar / self.first, place)
        if self.ends_at_zero:
            last = self.timesteps - ((log_alpha_bar - self.log_alpha_bars[-2].item()) / 2).exp()
            place = torch.where(-wide > falling[-2], last, place)
        return (place / self.timesteps).to(log_snr.dtype)


def check_betas(betas: Tensor) -> Tensor:
    """Return a table's betas if they are one, or say which is not."""
    rule = "a table of betas is a list of at least 2 numbers in (0, 1), only the last may be 1"
    if betas.ndim != 1 or len(betas) < 2:
        raise UsageError(f"{rule}; its shape is {tuple(betas.shape)}")
    inner = torch.arange(len(betas)) < len(betas) - 1
    wrong = (~((betas > 0) & (betas <= 1)) | (inner & (betas == 1))).nonzero().flatten().tolist()
    if wrong:
        raise UsageError(f"{rule}; beta {wrong[0]} is {betas[wrong[0]].item():g}")
    return betas


# Tables of betas --------------------------------------------------------------------------------


def linear_betas(count: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, " n"]:
    """Return betas (count,) rising linearly: DDPM's own schedule (https://arxiv.org/abs/2006.11239, section 4)."""
    return torch.linspace(first, last, count, dtype=torch.float64)


def scaled_linear_betas(count: int = 1000, first: float = 0.00085, last: float = 0.012) -> Float[Tensor, " n"]:
    """Return betas (count,) whose square roots rise linearly: latent diffusion's (https://arxiv.org/abs/2112.10752)."""
    return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64).square()


def betas_of_alpha_bar(alpha_bar: Float[Tensor, " n"], most: float = 0.999) -> Float[Tensor, " m"]:
    """Return beta_i = 1 - alpha_bar_(i+1) / alpha_bar_i, at most `most`, from alpha_bar at i = 0 .. T."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=most)


def cosine_betas(count: int = 1000, offset: float = 0.008, most: float = 0.999) -> Float[Tensor, " n"]:
    """Return the betas (count,) of the cosine schedule, clipped (https://arxiv.org/abs/2102.09672, eq. 17)."""
    alpha = Cosine(offset).alpha(torch.linspace(0, 1, count + 1, dtype=torch.float64))
    return betas_of_alpha_bar(alpha.square(), most)


def sigmoid_betas(
    count: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, most: float = 0.999
) -> Float[Tensor, " n"]:
    """Return the betas (count,) of the schedule whose alpha_bar is a sigmoid in t (https://arxiv.org/abs/2212.11972)."""
    t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    curve = torch.sigmoid(-(start + t * (end - start)) / tau)
    return betas_of_alpha_bar((curve - curve[-1]) / (curve[0] - curve[-1]), most)


def sigmoid_in_beta(count: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, " n"]:
    """Return betas (count,) that are a sigmoid in t themselves: what diffusers calls 'sigmoid' (from GeoDiff)."""
    return first + (last - first) * torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64))


def zero_terminal_snr(betas: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return betas rescaled so that sqrt(alpha_bar) ends at 0 and begins where it did.

    References:
        Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023), algorithm 1
        https://arxiv.org/abs/2305.08891
    """
    root = (1 - betas).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


BETAS: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled-linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "sigmoid-in-beta": sigmoid_in_beta,
}


def table(name: str, timesteps: int = 1000, zero_snr: bool = False, **options: float) -> Table:
    """Return the table of that name: linear, scaled-linear, cosine, sigmoid or sigmoid-in-beta.

    Arguments:
        name: Which betas.
        timesteps: Number of entries, at least 2.
        zero_snr: Rescale to zero terminal SNR.
        options: Arguments of that table's function.

    Example:
        >>> table("cosine", 50, zero_snr=True).zero_terminal_snr
        True
    """
    if timesteps < 2:
        raise UsageError(f"timesteps is {timesteps}; a table needs at least 2")
    if name not in BETAS:
        raise UsageError(f"there is no table {name!r}{nearest(name, BETAS)} (known: {', '.join(BETAS)})")
    betas = BETAS[name](timesteps, **options)
    return Table(zero_terminal_snr(betas) if zero_snr else betas)


# Each takes timesteps=1000, zero_snr=False and the options of its function above.
linear = partial(table, "linear")
scaled_linear = partial(table, "scaled-linear")
cosine = partial(table, "cosine")
sigmoid = partial(table, "sigmoid")
sigmoid_beta = partial(table, "sigmoid-in-beta")
