r"""Langevin dynamics and the reverse-time SDE: NCSN, Euler-Maruyama, predictor-corrector.

Annealed Langevin dynamics takes some steps of

    x <- x + (e / 2) score + sqrt(e) z,    e = step_size * sigma_t^2 (of x / alpha),                  (1)

at each noise level before it goes on to the next as it is (NCSN does not rescale). The reverse-time SDE of
dx = f x dt + g dw is

    dx = (f x - g^2 score) dt + g dw    (t falling),                                                 (2)

taken by Euler and Maruyama's rule, whose last step adds no noise. The predictor-corrector adds to it, at the
new level, Langevin steps whose size is set by a signal-to-noise ratio r,

    e = 2 a (r |z| / |score|)^2,    a = alpha_t^2 / alpha_s^2 (1 for VE), norms over a sample.       (3)

The score is -E / sigma.

References:
    Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), algorithm 1
    https://arxiv.org/abs/1907.05600
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), algorithms 2-5
    https://arxiv.org/abs/2011.13456
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.levels import Level, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask

DRAWS = 1 << 20  # corrections draw noise beyond the steps' own numbers


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """NCSN's annealed Langevin dynamics: at each level some steps of (1), then the next level.

    Arguments:
        moves: Langevin steps at each level, each an evaluation.
        step_size: The step's size, as a share of the level's variance; below 2, or it diverges.
        denoise: End with the data estimate, one evaluation more, rather than with a noisy sample.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> AnnealedLangevin(moves=5).stochastic
        True
    """

    moves: int = 5
    step_size: float = 0.2
    denoise: bool = True

    def __post_init__(self) -> None:
        if self.moves < 1 or not 0 < self.step_size < 2:
            raise UsageError(
                f"moves is {self.moves} and step_size {self.step_size}; moves is at least 1, step_size within (0, 2)"
            )

    def cost(self, here: Level, there: Level) -> int:
        return self.moves + (self.denoise and not there.sigma)

    @property
    def stochastic(self) -> bool:
        return True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x, x0 = state.x, state.x0
        for i in range(self.moves):
            estimate = ask(denoiser, x, state.t)
            x, x0 = self.nudge(x, estimate, step, noise.like(x, state.k + 1 + i * DRAWS)), estimate.x0
        if self.denoise and not all(b.sigma for b in step.there):
            last = ask(denoiser, x, state.t).x0
            ends = torch.tensor([b.sigma == 0 for b in step.there], device=x.device).reshape(-1, *[1] * (x.ndim - 1))
            x, x0 = torch.where(ends, last, x), torch.where(ends, last, x0)
        return replace(state, x=self.carry(x, estimate, step), x0=x0)

    def carry(self, x: Data, estimate: Estimate, step: Step) -> Data:
        """Return x seen at the next level, x / alpha as it is; where alpha = 0, DDIM's step."""
        ends = list(zip(step.here, step.there, strict=True))
        ratio = [1.0 if not b.sigma else b.alpha / a.alpha if a.alpha else 0.0 for a, b in ends]
        on_x0 = [b.alpha if not a.alpha and b.sigma else 0.0 for a, b in ends]
        on_eps = [b.sigma if not a.alpha and b.sigma else 0.0 for a, b in ends]
        return weighted([(ratio, x), (on_x0, estimate.x0), (on_eps, estimate.eps)])

    def nudge(self, x: Data, estimate: Estimate, step: Step, z: Tensor) -> Data:
        """Return x after one Langevin step at its level: (1), with score = -E / sigma."""
        ones = [1.0] * len(step.here)
        pull = [-self.step_size / 2 * a.sigma for a in step.here]
        spread = [math.sqrt(self.step_size) * a.sigma for a in step.here]
        return weighted([(ones, x), (pull, estimate.eps), (spread, z)])


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """The reverse-time SDE (2) by Euler and Maruyama's rule, one evaluation a step."""

    linear: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:
        return True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        estimate = ask(denoiser, state.x, state.t)
        return replace(state, x=reverse_step(denoiser, state, step, estimate, noise), x0=estimate.x0)


def reverse_step(denoiser: Denoiser, state: State, step: Step, estimate: Estimate, noise: Noise) -> Data:
    """Return x_s by one step of (2); to t = 0 it is the data estimate, and no noise is added.

    Where alpha = 0 the drift has no limit, and x tells nothing: the step is a draw of q(x_s | x_0 = D).
    """
    drift = denoiser.schedule.drift(state.t).tolist()
    diffusion = denoiser.schedule.diffusion(state.t).tolist()
    rows = [scales(*row) for row in zip(step.here, step.there, drift, diffusion, strict=True)]
    on_x, on_eps, on_x0, spread = (list(column) for column in zip(*rows, strict=True))
    terms = [(on_x, state.x), (on_eps, estimate.eps), (on_x0, estimate.x0)]
    if any(spread):
        terms.append((spread, noise.like(state.x, state.k + 1)))
    return weighted(terms)


def scales(here: Level, there: Level, f: float, g: float) -> tuple[float, float, float, float]:
    """Return the factors on x, E, D and z of one sample's step of (2)."""
    if not there.sigma:
        return 0.0, 0.0, 1.0, 0.0
    if not here.alpha:
        return 0.0, 0.0, there.alpha, there.sigma
    h = here.t - there.t
    return 1 - f * h, -(g**2) * h / here.sigma, 0.0, g * math.sqrt(h)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Euler and Maruyama's step as predictor, Langevin steps (3) as corrector at the new level.

    Arguments:
        corrections: Langevin steps a level, each an evaluation.
        snr: The ratio r of (3).

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> PredictorCorrector().stochastic
        True
    """

    corrections: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if self.corrections < 1 or not self.snr > 0:
            raise UsageError(
                f"corrections is {self.corrections} and snr {self.snr}; they must be at least 1 and above 0"
            )

    def cost(self, here: Level, there: Level) -> int:
        return 1 + self.corrections if there.sigma else 1

    @property
    def stochastic(self) -> bool:
        return True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        estimate = ask(denoiser, state.x, state.t)
        x = reverse_step(denoiser, state, step, estimate, noise)
        if not any(b.sigma for b in step.there):
            return replace(state, x=x, x0=estimate.x0)
        # A sample that has ended is asked at its start again, and stays.
        at = [b.t if b.sigma else a.t for a, b in zip(step.here, step.there, strict=True)]
        for i in range(self.corrections):
            x = self.correct(x, ask(denoiser, x, at), step, noise.like(x, state.k + 1 + (i + 1) * DRAWS))
        return replace(state, x=x, x0=estimate.x0)

    def correct(self, x: Data, estimate: Estimate, step: Step, z: Tensor) -> Data:
        """Return x after one Langevin step (3) at the new level; score = -E / sigma."""
        size = estimate.eps.flatten(1).norm(dim=1)
        ratio = torch.where(size > 0, z.flatten(1).norm(dim=1) / size, 0).tolist()
        rows = list(zip(ratio, step.here, step.there, strict=True))
        sizes = [2 * (a.alpha / b.alpha) ** 2 * (self.snr * r * b.sigma) ** 2 if b.sigma else 0.0 for r, a, b in rows]
        pull = [-size / b.sigma if b.sigma else 0.0 for size, b in zip(sizes, step.there, strict=True)]
        return weighted([([1.0] * len(sizes), x), (pull, estimate.eps), ([math.sqrt(2 * size) for size in sizes], z)])
