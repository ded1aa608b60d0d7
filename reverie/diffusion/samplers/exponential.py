r"""Exponential integrators: the one core of the multistep solvers, deterministic and stochastic.

With lambda = ln(alpha / sigma) as clock, the probability-flow ODE from t to s, h = lambda_s - lambda_t, is
solved exactly by

    x_s = (sigma_s / sigma_t) x_t + alpha_s int_0^h e^(u - h) D(lambda_t + u) du,                    (1)
    x_s = (alpha_s / alpha_t) x_t - alpha_s rho_t int_0^h e^(-u) E(lambda_t + u) du,                 (2)

D being the data estimate, E the noise estimate, rho = sigma / alpha. Only the integral of an unknown curve
is left to approximate, and a solver is a choice of polynomial for it: through the estimates F_j at some
nodes, so that the integral becomes sum_j c_j F_j with weights

    c_j = int_0^h w(u) l_j(u) du,    l_j the Lagrange polynomials of the nodes.                      (3)

One node is DDIM; the last p nodes an Adams-Bashforth rule of order p; with the new node among them, an
Adams-Moulton corrector. The reverse-time SDE whose noise is eta times as strong keeps the form of (1):

    x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s int_0^h r e^(r (u - h)) D du
          + sigma_s sqrt(1 - e^(-2 eta h)) z,    r = 1 + eta.                                        (4)

A step to sigma = 0 is x = D; and a node where nothing of the data was left (lambda = -inf) has no say.

References:
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
    https://arxiv.org/abs/2211.01095
    Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023)
    https://arxiv.org/abs/2204.13902
    Exponential integrators (Hochbruck & Ostermann, 2010), section 2.4
    https://doi.org/10.1017/S0962492910000048
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

Rule = Literal["half", "half-h", "exact"]
SERIES = 1.0  # below, moments by their series: the recurrence loses digits there


def moments(z: float, count: int) -> list[float]:
    r"""Return J_n = int_0^1 e^(z (u - 1)) u^n du for n below count, any finite z.

    J_0 = (1 - e^-z) / z and J_n = (1 - n J_(n-1)) / z; near z = 0, J_n = sum_k (-z)^k n! / (n + k + 1)!.

    Example:
        >>> [round(value, 12) for value in moments(0.0, 3)] == [1.0, 0.5, round(1 / 3, 12)]
        True
    """
    if abs(z) < SERIES:
        return [series(z, n) for n in range(count)]
    found = [-math.expm1(-z) / z]
    for n in range(1, count):
        found.append((1 - n * found[-1]) / z)
    return found


def series(z: float, n: int) -> float:
    """Return J_n by its series."""
    term = total = 1 / (n + 1)
    for k in range(1, 25):
        term *= -z / (n + k + 1)
        total += term
    return total


def lagrange(nodes: Sequence[float]) -> list[list[float]]:
    """Return the coefficients, by rising power, of the polynomial that is 1 at node j and 0 at the others, for each j.

    Example:
        >>> lagrange([0.0, 1.0])
        [[1.0, -1.0], [0.0, 1.0]]
    """
    found = []
    for j, own in enumerate(nodes):
        row = [1.0]
        for other in (node for i, node in enumerate(nodes) if i != j):
            scale = 1 / (own - other)
            up, same = [0.0, *row], [*row, 0.0]
            row = [(a - other * b) * scale for a, b in zip(up, same, strict=True)]
        found.append(row)
    return found


def data_weights(h: float, nodes: Sequence[float], rule: Rule = "exact") -> list[float]:
    r"""Return the weights of (1): c_j = int_0^h e^(u - h) l_j(u) du; they add up to 1 - e^-h.

    Arguments:
        h: The step in lambda; inf for one that ends at sigma = 0.
        nodes: Where the estimates were made, as lambda - lambda_t: 0 for the first, distinct.
        rule: With two nodes, half takes the published short cut for the slope's weight, B / 2 with B = 1 - e^-h
            (DPM-Solver++ 2M; UniPC's B_2), half-h the one with B = h (UniPC's B_1); exact is (3), also for all
            other numbers of nodes.

    Example:
        >>> data_weights(math.inf, [0.0, -1.0])
        [1.0, 0.0]
    """
    if h == 0 or math.isinf(h):
        return [1.0 if h else 0.0, *[0.0] * (len(nodes) - 1)]
    whole = -math.expm1(-h)
    if len(nodes) == 2 and rule != "exact":
        slope = (whole if rule == "half" else h) / 2 * h / nodes[1]
        return [whole - slope, slope]
    integrals = moments(h, len(nodes))
    return [h * sum(c * m for c, m in zip(row, integrals, strict=True)) for row in lagrange([u / h for u in nodes])]


def noise_weights(h: float, nodes: Sequence[float]) -> list[float]:
    r"""Return the weights of (2): c_j = int_0^h e^-u l_j(u) du; they add up to 1 - e^-h."""
    if h == 0 or math.isinf(h):
        return [1.0 if h else 0.0, *[0.0] * (len(nodes) - 1)]
    integrals = [math.exp(-h) * m for m in moments(-h, len(nodes))]
    return [h * sum(c * m for c, m in zip(row, integrals, strict=True)) for row in lagrange([u / h for u in nodes])]


@lru_cache(maxsize=65536)
def step_weights(lam: float, to: float, past: tuple[float, ...], eta: float, rule: Rule) -> tuple[float, ...]:
    """Return the data weights (current node first, then the past ones) of a step between two lambdas, as in (4).

    A past node at -inf has weight 0.
    """
    if lam == to:
        return (0.0,) * (1 + len(past))
    rate = 1 + eta
    known = [node for node in past if node > -math.inf] if lam > -math.inf else []
    found = data_weights(rate * (to - lam), [0.0, *(rate * (node - lam) for node in known)], rule)
    return (*found, *[0.0] * (len(past) - len(known)))
