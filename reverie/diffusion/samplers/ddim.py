r"""Denoising diffusion implicit models (DDIM), and their inversion.

    x_s = alpha_s D + sqrt(sigma_s^2 - (eta tau)^2) E + eta tau z,                                   (1)
    tau^2 = sigma_s^2 / sigma_t^2 (sigma_t^2 - alpha_t^2 / alpha_s^2 sigma_s^2),

with D = E[x_0 | x_t] and E the noise that goes with it. eta = 0 is the first-order solution of the
probability-flow ODE; eta = 1 is DDPM's posterior on the same grid, exactly. alpha and sigma belong to
the whole of the noise so far (alpha^2 is alpha_bar), not to a step.

References:
    Denoising Diffusion Implicit Models (Song et al., 2021), eq. 12 and 16
    https://arxiv.org/abs/2010.02502
"""

from dataclasses import dataclass, replace

import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Times
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.process import posterior_between
from reverie.diffusion.samplers.base import Sampler, State


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM.

    Arguments:
        eta: Stochasticity, from 0 (deterministic) to 1 (DDPM).

    Raises:
        UsageError: eta lies outside [0, 1].

    Example:
        >>> DDIM(eta=0.5).stochastic
        True
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta is {self.eta}; it must lie in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def move(self, denoiser: Denoiser, state: State, s: Times, noise: Noise) -> State:
        estimate = denoiser(state.x, state.t)
        at_s = denoiser.schedule.marginal(s)
        tau = torch.zeros_like(s)
        if self.eta:
            tau = self.eta * posterior_between(at_s, denoiser.schedule.marginal(state.t)).small.sqrt()
        kept = (at_s.sigma.square() - tau.square()).clamp(min=0).sqrt() if self.eta else at_s.sigma
        x = per_sample(at_s.alpha, state.x) * estimate.x0
        x = torch.addcmul(x, per_sample(kept, x), estimate.eps)
        if self.eta and bool((tau > 0).any()):
            x = torch.addcmul(x, per_sample(tau, x), noise.like(x, state.k + 1))
        return replace(state, x=x, x0=estimate.x0)


@dataclass(frozen=True)
class DDIMInversion(Sampler):
    r"""The inverse of DDIM (eta = 0): from x_s to the x_t, t > s, that DDIM takes to it.

        x_t = alpha_t / alpha_s x_s + (sigma_t - alpha_t sigma_s / alpha_s) E(x_t, t),               (2)

    solved for x_t by fixed-point iteration. The model is asked at t, where DDIM asks it, and never at
    t = 0. Walk an increasing grid: `grid.flip(0)`.

    Arguments:
        iterations: How often the model is evaluated in a step; 1 is the usual explicit approximation.
    """

    iterations: int = 4

    @property
    def evaluations(self) -> int:
        return self.iterations

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"iterations is {self.iterations}; it must be at least 1")

    def check_direction(self, t: Times, s: Times) -> None:
        if not bool(((s > t) & (s <= 1)).all()):
            raise UsageError(f"inversion goes from t to a later time, at most 1; got {t.tolist()} and {s.tolist()}")

    def move(self, denoiser: Denoiser, state: State, s: Times, noise: Noise) -> State:
        here, there = denoiser.schedule.marginal(state.t), denoiser.schedule.marginal(s)
        ratio = there.alpha / here.alpha
        carried = per_sample(ratio, state.x) * state.x
        added = per_sample(there.sigma - ratio * here.sigma, state.x)
        x = carried
        for _ in range(self.iterations):
            estimate = denoiser(x, s)
            x = carried + added * estimate.eps
        return replace(state, x=x, x0=estimate.x0)
