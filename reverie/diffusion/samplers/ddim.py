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

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import Level, marginal, weighted
from reverie.diffusion.process import posterior_between
from reverie.diffusion.samplers.base import Sampler, State, Step, ask


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
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta is {self.eta}; it must lie in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        estimate = ask(denoiser, state.x, state.t)
        tau = [self.eta * std for std in small_stds(step)] if self.eta else [0.0] * len(step.here)
        kept = [math.sqrt(max(s.sigma**2 - b**2, 0)) for s, b in zip(step.there, tau, strict=True)]
        terms = [([s.alpha for s in step.there], estimate.x0), (kept, estimate.eps)]
        if any(tau):
            terms.append((tau, noise.like(state.x, state.k + 1)))
        return replace(state, x=weighted(terms), x0=estimate.x0)


def small_stds(step: Step) -> list[float]:
    """Return the standard deviation tau of the posterior q(x_s | x_t, x_0) of each sample's step."""
    stds: list[float] = posterior_between(marginal(step.there), marginal(step.here)).small.sqrt().tolist()
    return stds


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

    def cost(self, here: Level, there: Level) -> int:
        return self.iterations

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"iterations is {self.iterations}; it must be at least 1")

    def check_direction(self, t: Sequence[float], s: Sequence[float]) -> None:
        if not all(a < b <= 1 for a, b in zip(t, s, strict=True)):
            raise UsageError(f"inversion goes from t to a later time, at most 1; got {t} and {s}")

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        ratio = [b.alpha / a.alpha for a, b in zip(step.here, step.there, strict=True)]
        added = [b.sigma - r * a.sigma for r, a, b in zip(ratio, step.here, step.there, strict=True)]
        x = weighted([(ratio, state.x)])
        for _ in range(self.iterations):
            estimate = ask(denoiser, x, step.s)
            x = weighted([(ratio, state.x), (added, estimate.eps)])
        return replace(state, x=x, x0=estimate.x0)
