r"""Adams-Bashforth rules for the noise estimate: DEIS, linear multistep, PNDM.

In x / alpha and rho = sigma / alpha the probability-flow ODE is d(x / alpha) / d rho = E, so that

    x_s = (alpha_s / alpha_t) x_t - alpha_s rho_t sum_j c_j E_j,
    c_j = int_v^1 l_j(clock(rho_t v')) dv',    v = rho_s / rho_t,                                    (1)

with l_j the Lagrange polynomials of the last nodes on some clock. The clock is the method:

    lambda    ln(alpha / sigma)                          DEIS' log-rho AB
    t         the schedule's own time                    DEIS' tAB
    rho       sigma / alpha                              the linear multistep of k-diffusion (LMS)
    index     the step's number, as if steps were equal  PNDM's linear multistep (PLMS)

PNDM here starts with lower orders, one evaluation a step, where the original has a Runge-Kutta start and
others repeat the first step: asked for N steps, it evaluates N times.

References:
    Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), section 3
    https://arxiv.org/abs/2204.13902
    Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), eq. 9-12
    https://arxiv.org/abs/2202.09778
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import Level, time_of, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask
from reverie.diffusion.samplers.exponential import noise_weights
from reverie.diffusion.samplers.history import History, orders
from reverie.diffusion.schedules import Schedule

Clock = Literal["lambda", "t", "rho", "index"]
POINTS = 24  # of Gauss and Legendre's quadrature
EQUAL = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class Adams(Sampler):
    """An Adams-Bashforth rule for the noise estimate, one evaluation a step.

    Arguments:
        order: How many estimates it goes through, 1 to 4.

    Raises:
        UsageError: The order is out of range.
    """

    order: int = 3
    clock: ClassVar[Clock]
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise UsageError(f"order is {self.order}; it must lie in 1..4")

    def on(self) -> Clock:
        """Return the clock."""
        return self.clock

    def remember(self, x: Data) -> dict[str, Tensor]:
        return History.empty(x, self.order - 1)

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        estimate = ask(denoiser, state.x, state.t)
        past = History.of(state, self.order - 1)
        nodes = past.nodes(orders(self.order, step))
        rows = zip(step.here, step.there, nodes, strict=True)
        weights = [clock_weights(denoiser.schedule, self.on(), a, b, older) for a, b, older in rows]
        terms = noise_terms(step, weights, [estimate.eps, *past.values], state.x, estimate.x0)
        return replace(state, x=weighted(terms), x0=estimate.x0, memory=past.push(estimate.eps, step.here))


def noise_terms(
    step: Step, weights: Sequence[Sequence[float]], estimates: Sequence[Tensor], x: Data, x0: Data
) -> list[tuple[list[float], Tensor]]:
    """Return the terms of equation (1); where nothing of the data is left at t, those of DDIM, which it becomes."""
    ends = list(zip(step.here, step.there, strict=True))
    terms = [([b.alpha / a.alpha if a.alpha else 0.0 for a, b in ends], x)]
    terms.append(([0.0 if a.alpha else b.alpha for a, b in ends], x0))
    for j, estimate in enumerate(estimates):
        scales = []
        for (a, b), w in zip(ends, weights, strict=True):
            own = -b.alpha * a.rho * w[j] if a.alpha and j < len(w) else 0.0
            scales.append(own if a.alpha or j else b.sigma)
        terms.append((scales, estimate))
    return terms


def clock_weights(
    schedule: Schedule, clock: Clock, here: Level, there: Level, past: tuple[float, ...]
) -> Sequence[float]:
    """Return the weights of (1), the current node first, then those at some past lambdas."""
    known = tuple(lam for lam in past if lam > -math.inf)
    if not known or here.lam == -math.inf:
        return (1 - there.rho / here.rho if here.alpha else 1.0,)
    if clock == "index":
        return [w * (1 - there.rho / here.rho) for w in EQUAL[len(known)]]
    if clock == "lambda":
        return noise_weights(there.lam - here.lam, [0.0, *(lam - here.lam for lam in known)])
    if clock == "rho":
        return quadrature(here.rho, there.rho, known, None)
    return quadrature(here.rho, there.rho, known, schedule)


@lru_cache(maxsize=4096)
def quadrature(rho: float, to: float, past: tuple[float, ...], schedule: Schedule | None) -> tuple[float, ...]:
    """Return the weights of (1) by quadrature in rho; the clock is the schedule's time, or rho where there is none."""
    x, w = np.polynomial.legendre.leggauss(POINTS)
    end = to / rho
    v = (1 + end) / 2 - (1 - end) / 2 * x
    nodes = np.array([rho, *(math.exp(-lam) for lam in past)])
    at, where = nodes, v * rho
    if schedule is not None:
        at = np.array(time_of(schedule, (-np.log(nodes)).tolist()))
        where = np.array(time_of(schedule, (-np.log(where)).tolist()))
    return tuple(float((1 - end) / 2 * (w * basis(where, at, j)).sum()) for j in range(len(nodes)))


def basis(u: np.ndarray, nodes: np.ndarray, j: int) -> np.ndarray:
    """Return the Lagrange polynomial l_j of some nodes at points u."""
    others = np.delete(nodes, j)
    return np.prod([(u - other) / (nodes[j] - other) for other in others], axis=0) * np.ones_like(u)


@dataclass(frozen=True)
class DEIS(Adams):
    """DEIS: the noise estimate as a polynomial in t (tAB), or in ln rho.

    Arguments:
        order: How many estimates it goes through, 1 to 4.
        variable: t, as its authors advise; lambda for their log-rho variant, which diffusers has.

    Example:
        >>> DEIS(variable="lambda").on()
        'lambda'
    """

    variable: Literal["t", "lambda"] = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variable not in ("t", "lambda"):
            raise UsageError(f"variable is {self.variable!r}; it must be t or lambda")

    def on(self) -> Clock:
        return self.variable


@dataclass(frozen=True)
class LMS(Adams):
    """Linear multistep in rho = sigma / alpha, by default of order 4."""

    order: int = 4
    clock: ClassVar[Clock] = "rho"


@dataclass(frozen=True)
class PNDM(Adams):
    """PNDM's linear multistep (PLMS): Adams-Bashforth for equal steps, carried by DDIM's; by default of order 4."""

    order: int = 4
    clock: ClassVar[Clock] = "index"
