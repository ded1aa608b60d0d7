r"""Sampling with models of few steps: consistency models, and average velocities.

A consistency function f goes from any t to the data at once, and further steps go back to less noise first,

    x_s = alpha_s f(x_t, t) + sqrt(sigma_s^2 - alpha_s^2 floor^2) z,                                (1)

`floor` being the noise that f leaves: 0, or its boundary. Of a model that is told how far it is to go, the average
velocity u(x_t, r, t) takes x_t to any earlier r,

    x_r = x_t - (t - r) u(x_t, r, t),                                                               (2)

which is DDIM's step with the span t - r given to the network beside its time.

References:
    Consistency Models (Song et al., 2023), algorithm 1
    https://arxiv.org/abs/2303.01469
    Mean Flows for One-step Generative Modeling (Geng et al., 2025), eq. 12
    https://arxiv.org/abs/2505.13447
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import weighted
from reverie.diffusion.samplers.base import Sampler, State, Step, ask


@dataclass(frozen=True)
class Consistency(Sampler):
    """One-step and multistep consistency sampling (1).

    Arguments:
        floor: The noise, as sigma / alpha, that the model leaves in its data estimate.

    Raises:
        UsageError: floor is below 0; on a step, above the noise where it goes.

    Example:
        >>> Consistency().stochastic
        True
    """

    floor: float = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor < math.inf:
            raise UsageError(f"floor is {self.floor}; it must be at least 0")

    @property
    def stochastic(self) -> bool:
        return True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x0 = ask(denoiser, state.x, state.t).x0
        kept = [max(there.sigma**2 - (there.alpha * self.floor) ** 2, 0) ** 0.5 for there in step.there]
        terms = [([there.alpha for there in step.there], x0)]
        if any(kept):
            terms.append((kept, noise.like(x0, state.k + 1)))
        return replace(state, x=weighted(terms), x0=x0)


@dataclass(frozen=True)
class MeanFlow(Sampler):
    """Steps of average velocity (2), for a network that takes `span`.

    Example:
        >>> MeanFlow().stochastic
        False
    """

    tells: ClassVar[tuple[str, ...]] = ("span",)

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        t = state.t.to(state.x.device)
        estimate = denoiser(state.x, t, {"span": t - step.s.to(t)})
        terms = [
            ([there.alpha for there in step.there], estimate.x0),
            ([there.sigma for there in step.there], estimate.eps),
        ]
        return replace(state, x=weighted(terms), x0=estimate.x0)
