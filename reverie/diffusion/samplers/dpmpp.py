r"""DPM-Solver++: the data estimate extrapolated in lambda, multistep and singlestep, with and without noise.

    2M    nodes lambda_t and the one before            1 evaluation a step
    3M    and the one before that                      1
    2S    nodes lambda_t and the middle of the step    2
    3S    nodes at 0, 1/3 and 2/3 of the step          3

All are (1) and, with noise, (4) of exponential.py. The 2M step's slope has the weight (1 - e^-h) / 2 of the
paper, or the exact one: `rule`. 3M has the exact weights; the form in circulation (its authors', diffusers',
k-diffusion's) gives the second difference half of its weight, and converges no faster than 2M: see
docs/solvers.md. In runs of fewer than 15 steps the order falls towards the end.

References:
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
    https://arxiv.org/abs/2211.01095
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import Level, levels, time_of, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask
from reverie.diffusion.samplers.exponential import Rule, step_weights
from reverie.diffusion.samplers.history import History, orders

FEW = 15  # steps, below which the order falls towards the end


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M), second order, one evaluation a step.

    Arguments:
        rule: The slope's weight: half, the published one; exact, the integral's.
        eta: Strength of the noise: 0 for the ODE, 1 for the reverse SDE.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> DPMpp2M().stochastic, DPMpp2M(eta=1.0).stochastic
        (False, True)
    """

    rule: Rule = "half"
    eta: float = 0.0
    order: ClassVar[int] = 2
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rule not in ("half", "exact"):
            raise UsageError(f"rule is {self.rule!r}; it must be half or exact")
        if not 0 <= self.eta <= 10:
            raise UsageError(f"eta is {self.eta}; it must lie in [0, 10]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def remember(self, x: Data) -> dict[str, Tensor]:
        return History.empty(x, self.order - 1)

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x0 = ask(denoiser, state.x, state.t).x0
        past = History.of(state, self.order - 1)
        due = orders(self.order, step, fall_below=FEW)
        weights = [self.weights(*row) for row in zip(step.here, step.there, past.nodes(due), strict=True)]
        terms = linear_terms(step, weights, [x0, *past.values], state.x, self.eta)
        if self.eta and any(spread := [noise_std(a, b, self.eta) for a, b in zip(step.here, step.there, strict=True)]):
            terms.append((spread, noise.like(x0, state.k + 1)))
        return replace(state, x=weighted(terms), x0=x0, memory=past.push(x0, step.here))

    def weights(self, here: Level, there: Level, past: tuple[float, ...]) -> tuple[float, ...]:
        """Return the weights of the estimates for one sample, the current one first."""
        return step_weights(here.lam, there.lam, past, self.eta, self.rule)


def linear_terms(
    step: Step, weights: Sequence[Sequence[float]], estimates: Sequence[Tensor], x: Data, eta: float = 0.0
) -> list[tuple[list[float], Tensor]]:
    """Return the terms of equation (1) or (4): what is kept of x, and alpha_s c_j D_j for each estimate."""
    keep = [kept(a, b, eta) for a, b in zip(step.here, step.there, strict=True)]
    terms = [(keep, x)]
    for j, estimate in enumerate(estimates):
        scales = [b.alpha * (w[j] if j < len(w) else 0.0) for b, w in zip(step.there, weights, strict=True)]
        terms.append((scales, estimate))
    return terms


def kept(here: Level, there: Level, eta: float) -> float:
    """Return the factor on x_t in equation (4)."""
    if not there.sigma:
        return 0.0
    shrink = math.exp(-eta * (there.lam - here.lam)) if eta else 1.0
    return there.sigma / here.sigma * shrink


def noise_std(here: Level, there: Level, eta: float) -> float:
    """Return the factor on the noise in equation (4)."""
    return there.sigma * math.sqrt(-math.expm1(-2 * eta * (there.lam - here.lam))) if there.sigma else 0.0


@dataclass(frozen=True)
class DPMpp2MSDE(DPMpp2M):
    """DPM-Solver++(2M) of the reverse SDE: DPMpp2M with eta = 1."""

    eta: float = 1.0


@dataclass(frozen=True)
class DPMpp3M(DPMpp2M):
    """DPM-Solver++(3M), third order, one evaluation a step, with exact weights."""

    rule: Rule = "exact"
    order: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule != "exact":
            raise UsageError(f"rule is {self.rule!r}; dpmpp-3m knows only exact")


@dataclass(frozen=True)
class DPMpp3MSDE(DPMpp3M):
    """DPM-Solver++(3M) of the reverse SDE: DPMpp3M with eta = 1."""

    eta: float = 1.0


# Singlestep -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMpp2S(Sampler):
    """DPM-Solver++(2S), second order, two evaluations a step, of which it remembers nothing.

    Arguments:
        r: Where in the step, on the clock lambda, the second evaluation lies, in (0, 1].

    Raises:
        UsageError: r is out of range.

    Example:
        >>> DPMpp2S().stochastic
        False
    """

    r: float = 0.5
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise UsageError(f"r is {self.r}; it must lie in (0, 1]")

    def cost(self, here: Level, there: Level) -> int:
        return 2 if here.alpha and there.sigma else 1

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        first = ask(denoiser, state.x, state.t).x0
        if not any(inner(step)):
            return replace(state, x=along(step, step.there, state.x, [first]), x0=first)
        middle = between(denoiser, step, self.r)
        second = ask(denoiser, along(step, middle, state.x, [first]), [level.t for level in middle]).x0
        x = along(step, step.there, state.x, [first, second], middle, "half")
        return replace(state, x=x, x0=first)


@dataclass(frozen=True)
class DPMpp3S(Sampler):
    """DPM-Solver++(3S), third order, three evaluations a step, at 0, 1/3 and 2/3 of it on the clock lambda."""

    linear: ClassVar[bool] = True

    def cost(self, here: Level, there: Level) -> int:
        return 3 if here.alpha and there.sigma else 1

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        first = ask(denoiser, state.x, state.t).x0
        if not any(inner(step)):
            return replace(state, x=along(step, step.there, state.x, [first]), x0=first)
        third, later = between(denoiser, step, 1 / 3), between(denoiser, step, 2 / 3)
        second = ask(denoiser, along(step, third, state.x, [first]), [level.t for level in third]).x0
        ahead = along(step, later, state.x, [first, second], third)
        last = ask(denoiser, ahead, [level.t for level in later]).x0
        return replace(state, x=along(step, step.there, state.x, [first, last], later), x0=first)


def inner(step: Step) -> list[bool]:
    """Return for each sample whether its step has finite ends in lambda, and so an inside."""
    return [a.lam > -math.inf and b.lam < math.inf for a, b in zip(step.here, step.there, strict=True)]


def between(denoiser: Denoiser, step: Step, r: float) -> list[Level]:
    """Return the level at a fraction r of each step on the clock lambda; where a step has no inside, its start."""
    ends = zip(step.here, step.there, inner(step), strict=True)
    lam = [a.lam + r * (b.lam - a.lam) if inside else a.lam for a, b, inside in ends]
    times = time_of(denoiser.schedule, lam)
    fixed = zip(times, step.here, inner(step), strict=True)
    return levels(denoiser.schedule, [t if inside else a.t for t, a, inside in fixed])


def along(
    step: Step,
    there: Sequence[Level],
    x: Data,
    estimates: Sequence[Tensor],
    node: Sequence[Level] | None = None,
    rule: Rule = "exact",
) -> Data:
    """Return x at a level of each step, by (1) with the first estimate and, if there is one, that at a node."""
    weights = []
    for a, b, n in zip(step.here, there, node or step.here, strict=True):
        past = (n.lam,) if n.lam != a.lam else ()
        weights.append(step_weights(a.lam, b.lam, past, 0.0, rule))
    return weighted(linear_terms(replace(step, there=there), weights, estimates, x))
