r"""Objectives: what a denoiser is trained to minimise, one loss for each sample.

    L_simple = w(t) E d(F(x_t, t), p x_0 + q eps),    d = |.|, |.|^2 or Huber's,                     (1)
    L_vlb    = E of the terms of the variational bound, in bits/dim (likelihood.py),                (2)
    L_hybrid = L_simple + 0.001 T L_vlb, the mean held fixed in the second term.                     (3)

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 14
    https://arxiv.org/abs/2006.11239
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 16
    https://arxiv.org/abs/2102.09672
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.likelihood import check_options, term
from reverie.diffusion.predictions import Data, Prediction
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import predictions, weights
from reverie.diffusion.schedules import Table
from reverie.diffusion.weights import Uniform, Weight

Distance = Literal["l2", "l1", "huber"]


def distance(kind: Distance, difference: Data, width: float) -> Data:
    """Return the elementwise distance of a difference (B, *D).

    l2 is the square, l1 the magnitude, and huber the square's half up to `width` and linear beyond:
    width (|d| - width / 2).
    """
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    return functional.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=width)


class Objective(ABC):
    """A loss for each sample, given the noise and the times.

    `draws` says whether it draws from torch's own generators, which the trainer then seeds for each step, `denoises`
    whether what it trains is a denoiser, whose data estimate is the posterior mean, and `learned` is a network of the
    objective's own that is trained along with the denoiser's.
    """

    draws: bool = False
    denoises: bool = True
    learned: nn.Module | None = None

    def begin(self, step: int) -> None:  # noqa: B027 - most know no steps
        """Take note of the step (from 0) that comes next: what a curriculum or a warm-up goes by."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        """Return the loss (B,) at clean data x0 (B, *D), times t (B,) and noise eps (B, *D)."""


class Simple(Objective):
    """L_simple (1): the distance between the estimate and the truth, in a target's space.

    Arguments:
        target: The space of the error: eps, x0, v, velocity, score or edm, by name or as an object.
        distance: l2, l1 or huber.
        weight: uniform, min-snr, p2 or edm, by name or as an object.
        huber_width: Where Huber's distance turns from square to linear.

    Raises:
        UsageError: A name that there is not; a weight other than uniform with l1 or huber, for which it has no
            meaning; a width without huber, which would have no effect.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> Simple("eps")(point, torch.ones(1, 2), torch.tensor([0.5]).double(), torch.ones(1, 2))
        tensor([0.])
    """

    def __init__(
        self,
        target: str | Prediction = "eps",
        distance: Distance = "l2",
        weight: str | Weight = "uniform",
        huber_width: float = 1.0,
    ) -> None:
        if distance not in ("l2", "l1", "huber"):
            raise UsageError(f"the distance is {distance!r}; it must be l2, l1 or huber")
        if not huber_width > 0:
            raise UsageError(f"huber_width is {huber_width}; it must be positive")
        if distance != "huber" and huber_width != 1.0:
            raise UsageError(f"huber_width is {huber_width}, which has no effect on {distance}; leave it out")
        self.target: Prediction = predictions[target]() if isinstance(target, str) else target
        self.weight: Weight = weights[weight]() if isinstance(weight, str) else weight
        if distance != "l2" and not isinstance(self.weight, Uniform):
            raise UsageError(f"weight {weight!r} is defined for the squared error; with {distance} it must be uniform")
        self.distance, self.huber_width = distance, huber_width

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        x = diffuse(denoiser.schedule, x0, t, eps)
        return self.loss(denoiser, denoiser(x, t, condition), x0, t, eps)

    def loss(self, denoiser: Denoiser, estimate: Estimate, x0: Data, t: Times, eps: Data) -> Float[Tensor, " b"]:
        """Return the loss (B,) of an estimate made already."""
        alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        error = self.target.encode(estimate.x0 - x0, estimate.eps - eps, alpha, sigma)
        mean = distance(self.distance, error, self.huber_width).flatten(1).mean(1)
        return self.weight(self.target, alpha, sigma).to(mean) * mean


class Variational(Objective):
    """L_vlb (2): T times the bound's term at each sample's time, in bits/dim, so that its mean is the bound.

    Arguments:
        variance: small, large or learned.
        levels: The data's levels in [-1, 1]: 256 for 8 bits, or None for data that is continuous.

    Raises:
        UsageError: The schedule is no table, or there is no such variance or number of levels.
    """

    def __init__(self, variance: Literal["small", "large", "learned"] = "small", levels: int | None = 256) -> None:
        check_options(variance, levels)
        self.variance, self.levels = variance, levels

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        x = diffuse(denoiser.schedule, x0, t, eps)
        return self.loss(denoiser, denoiser(x, t, condition), x0, x, t)

    def loss(self, denoiser: Denoiser, estimate: Estimate, x0: Data, x: Data, t: Times) -> Float[Tensor, " b"]:
        """Return the loss (B,) of an estimate made already."""
        schedule = denoiser.schedule
        if not isinstance(schedule, Table):
            raise UsageError("L_vlb needs a schedule that is a table; L_simple trains on any")
        return schedule.timesteps * term(schedule, estimate, x0, x, t, self.variance, self.levels)


class Hybrid(Objective):
    """L_hybrid (3): L_simple, and a little of L_vlb to teach the variance alone.

    Arguments:
        simple: The first term.
        scale: The weight of the second; 0.001 in the paper (on T times the bound's mean term, as here).
        levels: The data's levels in [-1, 1], or None for data that is continuous.
    """

    def __init__(self, simple: Simple | None = None, scale: float = 0.001, levels: int | None = 256) -> None:
        self.simple = simple or Simple("eps")
        self.variational, self.scale = Variational("learned", levels), scale

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        x = diffuse(denoiser.schedule, x0, t, eps)
        estimate = denoiser(x, t, condition)
        held = Estimate(estimate.x0.detach(), estimate.eps.detach(), estimate.fraction)
        bound = self.variational.loss(denoiser, held, x0, x, t)
        return self.simple.loss(denoiser, estimate, x0, t, eps) + self.scale * bound


def errors_by_time(losses: Tensor, t: Times, bins: int = 10) -> Float[Tensor, " n"]:
    """Return the mean loss (bins,) in equal bins of t; NaN where there is no sample."""
    index = (t.double() * bins - 1e-9).ceil().long().clamp(1, bins) - 1  # 0.7 * 10 is a little more than 7
    total = torch.zeros(bins, dtype=torch.float64).index_add_(0, index.cpu(), losses.detach().double().cpu())
    count = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, index.cpu(), torch.ones(len(losses), dtype=torch.float64)
    )
    return total / count
