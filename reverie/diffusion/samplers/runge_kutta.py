r"""Euler, Heun and the midpoint rule in rho = sigma / alpha, with EDM's churn and with ancestral noise.

In z = x / alpha the probability-flow ODE is dz / d rho = E. Euler's step is DDIM's, exactly. Heun's takes
E at both ends,

    z_s = z_t + (rho_s - rho_t) (E_t + E_s) / 2,                                                     (1)

and DPM2's that in the middle of ln rho. To rho = 0 all three are Euler's step, x = D. EDM first adds noise,

    rho' = rho (1 + gamma),    gamma = min(churn / N, sqrt 2 - 1) within [churn_min, churn_max],     (2)

as far as the schedule goes; the ancestral rule steps to rho_down and then adds noise of rho_up,

    rho_up = min(rho_s, eta sqrt(rho_s^2 (rho_t^2 - rho_s^2) / rho_t^2)),    rho_down^2 = rho_s^2 - rho_up^2,  (3)

which for Euler's step is DDIM's eta. Where alpha = 0 there is no z, and the step is DDIM's.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithms 1 and 2
    https://arxiv.org/abs/2206.00364
    DPM-Solver (Lu et al., 2022), DPM-Solver-2
    https://arxiv.org/abs/2206.00927
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.levels import Level, levels, time_of, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Churned(Sampler):
    """What Euler and Heun share: EDM's churn.

    Arguments:
        churn: S_churn: 0 for none. It is spread over the steps, whose number the loop must say.
        churn_min: S_tmin, as rho: below it there is no churn.
        churn_max: S_tmax, as rho: above it there is none.
        churn_noise: S_noise: the scale of the noise that is added.

    Raises:
        UsageError: An option is out of range.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.churn >= 0 or not self.churn_noise > 0 or not 0 <= self.churn_min <= self.churn_max:
            raise UsageError(
                f"churn is {self.churn}, its noise {self.churn_noise}, its range {self.churn_min}..{self.churn_max}; "
                "they must obey churn >= 0, noise > 0, 0 <= min <= max"
            )

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def stir(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> tuple[Data, list[Level]]:
        """Return x with noise added by (2), and the levels at which it then is."""
        if not self.churn:
            return state.x, list(step.here)
        gammas = [self.gamma(*row) for row in zip(step.here, step.k, step.left, strict=True)]
        there = raised(denoiser.schedule, step.here, gammas)
        if there == list(step.here):
            return state.x, there
        keep = [b.alpha / a.alpha if a.alpha else 1.0 for a, b in zip(step.here, there, strict=True)]
        added = [extra_noise(a, b) * self.churn_noise for a, b in zip(step.here, there, strict=True)]
        return weighted([(keep, state.x), (added, noise.like(state.x, state.k + 1))]), there

    def gamma(self, here: Level, k: int, left: int | None) -> float:
        """Return gamma of equation (2)."""
        if left is None:
            raise UsageError("churn is spread over the steps of a run; tell step how many are left")
        inside = self.churn_min <= here.rho <= self.churn_max
        return min(self.churn / (k + 1 + left), math.sqrt(2) - 1) if inside else 0.0


def raised(schedule: Schedule, here: Sequence[Level], gammas: Sequence[float]) -> list[Level]:
    """Return the level at rho (1 + gamma) of each; that of t = 1 where the schedule does not go as far."""
    (end,) = levels(schedule, [1.0])
    up = [a.lam - math.log1p(gamma) if gamma and a.alpha else a.lam for a, gamma in zip(here, gammas, strict=True)]
    times = time_of(schedule, [max(lam, end.lam) for lam in up])
    moved = zip(here, up, times, strict=True)
    return levels(schedule, [a.t if lam == a.lam else max(t, a.t) for a, lam, t in moved])


def extra_noise(here: Level, there: Level) -> float:
    """Return the standard deviation of the noise that takes x from one level to a noisier one."""
    return math.sqrt(max(there.sigma**2 - (there.alpha / here.alpha * here.sigma) ** 2, 0)) if here.alpha else 0.0


def euler(there: Sequence[Level], estimate: Estimate) -> list[tuple[list[float], Tensor]]:
    """Return the terms of Euler's step in rho: alpha_s D + sigma_s E."""
    return [([b.alpha for b in there], estimate.x0), ([b.sigma for b in there], estimate.eps)]


def slope_step(here: Sequence[Level], there: Sequence[Level], x: Data, slope: Tensor) -> Data:
    """Return x_s = alpha_s (x_t / alpha_t + (rho_s - rho_t) E) for some noise E."""
    keep = [b.alpha / a.alpha for a, b in zip(here, there, strict=True)]
    scale = [b.sigma - r * a.sigma for r, a, b in zip(keep, here, there, strict=True)]
    return weighted([(keep, x), (scale, slope)])


@dataclass(frozen=True)
class Euler(Churned):
    """Euler's rule in rho, which is DDIM's, with EDM's churn where it is asked for.

    Example:
        >>> Euler().stochastic
        False
    """

    linear: ClassVar[bool] = True

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x, here = self.stir(denoiser, state, step, noise)
        estimate = ask(denoiser, x, [level.t for level in here])
        return replace(state, x=weighted(euler(step.there, estimate)), x0=estimate.x0)


@dataclass(frozen=True)
class Heun(Churned):
    """Heun's rule in rho, two evaluations a step and one for the last: EDM's sampler without its noise.

    Example:
        >>> Heun(churn=40.0).stochastic
        True
    """

    linear: ClassVar[bool] = True

    def cost(self, here: Level, there: Level) -> int:
        return 2 if here.alpha and there.sigma else 1

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x, here = self.stir(denoiser, state, step, noise)
        first = ask(denoiser, x, [level.t for level in here])
        ahead = weighted(euler(step.there, first))
        inside = [bool(a.alpha and b.sigma) for a, b in zip(here, step.there, strict=True)]
        if not any(inside):
            return replace(state, x=ahead, x0=first.x0)
        # A sample whose step is Euler's is asked again at its own start, which changes nothing.
        again = [b if ok else a for a, b, ok in zip(here, step.there, inside, strict=True)]
        second = ask(denoiser, where(inside, ahead, x), [level.t for level in again])
        half = [0.5 if ok else 0.0 for ok in inside]
        slope = weighted([([1 - h for h in half], first.eps), (half, second.eps)])
        safe = [a if ok else b for a, b, ok in zip(here, step.there, inside, strict=True)]
        better = slope_step(safe, step.there, x, slope)
        return replace(state, x=where(inside, better, ahead), x0=first.x0)


@dataclass(frozen=True)
class EDMHeun(Heun):
    """EDM's stochastic sampler: Heun's rule with churn, by default as its authors set it for ImageNet-64."""

    churn: float = 40.0
    churn_min: float = 0.05
    churn_max: float = 50.0
    churn_noise: float = 1.003


def where(condition: Sequence[bool], x: Data, other: Data) -> Data:
    """Return the rows of x where a condition holds, else those of another."""
    if all(condition):
        return x
    mask = x.new_tensor([1.0 if c else 0.0 for c in condition]).reshape(-1, *[1] * (x.ndim - 1))
    return x.where(mask > 0, other)


@dataclass(frozen=True)
class DPM2(Sampler):
    """DPM-Solver-2: the midpoint rule, its middle in ln rho; two evaluations a step, one for the last.

    Arguments:
        eta: Strength of the ancestral noise (3), 0 for none.

    Raises:
        UsageError: eta lies outside [0, 1].

    Example:
        >>> DPM2(eta=1.0).stochastic
        True
    """

    eta: float = 0.0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta is {self.eta}; it must lie in [0, 1]")

    def cost(self, here: Level, there: Level) -> int:
        return 2 if here.alpha and there.sigma else 1

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        first = ask(denoiser, state.x, state.t)
        up, down = self.split(denoiser.schedule, step)
        ahead = weighted(euler(down, first))
        inside = [bool(a.alpha and b.sigma) for a, b in zip(step.here, step.there, strict=True)]
        if any(inside):
            ahead = self.midpoint(denoiser, state, replace(step, there=down), first, ahead, inside)
        ratio = [b.alpha / d.alpha for b, d in zip(step.there, down, strict=True)]
        terms = [(ratio, ahead)]
        if any(up):
            terms.append(([b.alpha * u for b, u in zip(step.there, up, strict=True)], noise.like(ahead, state.k + 1)))
        return replace(state, x=weighted(terms), x0=first.x0)

    def midpoint(
        self, denoiser: Denoiser, state: State, step: Step, first: Estimate, ahead: Data, inside: Sequence[bool]
    ) -> Data:
        """Return where the slope at the middle of ln rho leads."""
        ends = list(zip(step.here, step.there, inside, strict=True))
        lam = [(a.lam + b.lam) / 2 if ok else a.lam for a, b, ok in ends]
        times = [t if ok else a.t for t, (a, _, ok) in zip(time_of(denoiser.schedule, lam), ends, strict=True)]
        middle = levels(denoiser.schedule, times)
        second = ask(denoiser, where(inside, weighted(euler(middle, first)), state.x), times)
        safe = [a if ok else b for a, b, ok in ends]
        return where(inside, slope_step(safe, step.there, state.x, second.eps), ahead)

    def split(self, schedule: Schedule, step: Step) -> tuple[list[float], list[Level]]:
        """Return rho_up of (3) and the level of rho_down, for each sample."""
        if not self.eta:
            return [0.0] * len(step.here), list(step.there)
        up = [rho_up(a, b, self.eta) for a, b in zip(step.here, step.there, strict=True)]
        pairs = list(zip(step.there, up, strict=True))
        lam = [-0.5 * math.log(b.rho**2 - u**2) if u < b.rho else b.lam for b, u in pairs]
        times = time_of(schedule, lam)
        # To rho_down = 0 there is no level but t = 0, and the step is Euler's.
        down = [0.0 if u and u >= b.rho else t if u else b.t for (b, u), t in zip(pairs, times, strict=True)]
        return up, levels(schedule, down)


def rho_up(here: Level, there: Level, eta: float) -> float:
    """Return the ancestral noise of (3)."""
    if not there.sigma:
        return 0.0
    ratio = there.rho / here.rho if here.alpha else 0.0
    return min(there.rho, eta * there.rho * math.sqrt(1 - ratio**2))


@dataclass(frozen=True)
class DPM2Ancestral(DPM2):
    """DPM2 with ancestral noise, eta = 1."""

    eta: float = 1.0


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """Euler's rule with ancestral noise (3): DDIM, with eta = 1."""

    eta: float = 1.0
