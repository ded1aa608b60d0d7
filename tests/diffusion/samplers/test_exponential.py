"""The weights of exponential integrators against integrals worked out with sixty digits."""

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.diffusion.samplers.exponential import (
    SERIES,
    data_weights,
    lagrange,
    moments,
    noise_weights,
    step_weights,
)

SIZES = [1e-8, 1e-3, 0.1, 0.5, 0.99, 1.0, 1.01, 2.0, 5.0, 10.0, 25.0, 50.0]


@cache
def moment(z: float, n: int) -> Decimal:
    """J_n(z) = sum_k (-z)^k n! / (n + k + 1)!, whose terms reach e^50 before they fall: hence the digits."""
    with localcontext() as context:
        context.prec = 90
        term = total = Decimal(1) / (n + 1)
        for k in range(1, 400):
            term *= -Decimal(z) / (n + k + 1)
            total += term
        return total


def integral(h: float, powers: Sequence[float]) -> Decimal:
    """int_0^h e^(u - h) sum_k powers[k] u^k du."""
    with localcontext() as context:
        context.prec = 60
        return sum((Decimal(c) * Decimal(h) ** (k + 1) * moment(h, k) for k, c in enumerate(powers)), Decimal(0))


def value(powers: Sequence[float], u: float) -> float:
    return sum(c * u**k for k, c in enumerate(powers))


# Moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [*SIZES, *(-z for z in SIZES), 0.0])
def test_moments_have_all_their_digits(z):
    for n, got in enumerate(moments(z, 5)):
        assert got == pytest.approx(float(moment(z, n)), rel=2e-14 if n < 4 else 1e-13)


def test_the_reference_is_an_integral():
    """Of e^(z (u - 1)) u^n, by Simpson's rule."""
    for z in (-3.0, 0.7, 8.0):
        for n in range(4):
            curve = [math.exp(z * (i / 1000 - 1)) * (i / 1000) ** n for i in range(1001)]
            simpson = (curve[0] + 4 * sum(curve[1::2]) + 2 * sum(curve[2:-1:2]) + curve[-1]) / 3000
            assert float(moment(z, n)) == pytest.approx(simpson, rel=1e-9)


def test_series_and_recurrence_meet_where_one_takes_over():
    below, above = moments(math.nextafter(SERIES, 0), 4), moments(SERIES, 4)
    assert below == pytest.approx(above, rel=1e-14)


@given(st.floats(-40, 40), st.integers(0, 3))
def test_moments_obey_their_recurrence(z, n):
    """z J_(n+1) + (n + 1) J_n = 1, by parts."""
    found = moments(z, n + 2)
    assert z * found[n + 1] + (n + 1) * found[n] == pytest.approx(1, abs=1e-12 * (1 + abs(z) * found[n + 1]))


# Weights --------------------------------------------------------------------------------------

apart = st.lists(st.integers(1, 30), max_size=3, unique=True).map(lambda steps: [0.0, *(-k / 8 for k in steps)])
steps = st.floats(1e-3, 8)


def test_lagrange_polynomials_are_one_at_their_own_node_and_zero_at_the_others():
    nodes = [0.0, -0.7, 1.3, 0.4]
    for j, powers in enumerate(lagrange(nodes)):
        assert [value(powers, u) for u in nodes] == pytest.approx([float(i == j) for i in range(4)], abs=1e-13)


@given(steps, apart, st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_data_weights_integrate_polynomials_exactly(h, nodes, coefficients):
    """As many powers as there are nodes, against e^(u - h), wherever the nodes are."""
    powers = coefficients[: len(nodes)]
    weights = data_weights(h, nodes)
    terms = [w * value(powers, u) for w, u in zip(weights, nodes, strict=True)]
    assert sum(terms) == pytest.approx(float(integral(h, powers)), abs=1e-12 * (1 + sum(map(abs, terms))))


@given(steps, apart, st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_noise_weights_integrate_polynomials_exactly(h, nodes, coefficients):
    """Against e^-u; with u = h - v that is e^(v - h) and a polynomial in h - v."""
    powers = coefficients[: len(nodes)]
    with localcontext() as context:
        context.prec = 60
        turned = [Decimal(0)] * len(powers)
        for k, c in enumerate(powers):
            for i in range(k + 1):
                turned[i] += Decimal(c) * math.comb(k, i) * Decimal(h) ** (k - i) * (-1) ** i
        want = float(integral(h, turned))
    terms = [w * value(powers, u) for w, u in zip(noise_weights(h, nodes), nodes, strict=True)]
    assert sum(terms) == pytest.approx(want, abs=1e-11 * (1 + sum(map(abs, terms))))


def test_one_power_more_is_not_integrated():
    """What these tests would see, were the weights those of fewer nodes."""
    nodes, h = [0.0, -0.5], 0.7
    got = sum(w * u * u for w, u in zip(data_weights(h, nodes), nodes, strict=True))
    assert abs(got - float(integral(h, [0, 0, 1]))) > 0.1


@given(steps, apart)
def test_weights_add_up(h, nodes):
    for rule in ("half", "half-h", "exact"):
        weights = data_weights(h, nodes, rule)
        assert sum(weights) == pytest.approx(-math.expm1(-h), abs=1e-12 * (1 + sum(map(abs, weights))))
    weights = noise_weights(h, nodes)
    assert sum(weights) == pytest.approx(-math.expm1(-h), abs=1e-11 * (1 + sum(map(abs, weights))))


@pytest.mark.parametrize("rule", ["half", "half-h"])
def test_the_short_cuts_agree_with_the_exact_slope_to_the_second_order(rule):
    """The slope's weights differ by a multiple of h^3, as a second-order method may: 1/12 and -1/6 of it."""
    share = {"half": -1 / 12, "half-h": 1 / 6}[rule]
    for h in (1e-2, 1e-3):
        short, right = data_weights(h, [0.0, -1.0], rule)[1], data_weights(h, [0.0, -1.0])[1]
        assert (right - short) / h**3 == pytest.approx(share, rel=2 * h)


@pytest.mark.parametrize("rule", ["half-h", "half"])
def test_with_any_but_two_nodes_the_rule_has_no_say(rule):
    for nodes in ([0.0], [0.0, -0.4, -1.0]):
        assert data_weights(0.3, nodes, rule) == data_weights(0.3, nodes)


def test_two_nodes_are_dpm_solver_pp_2m():
    """With r = h_before / h: (1 - e^-h) ((1 + 1 / 2r) D - 1 / 2r D_before)."""
    h, before = 0.8, 0.5
    whole, r = -math.expm1(-h), before / h
    assert data_weights(h, [0.0, -before], "half") == pytest.approx([whole * (1 + 1 / (2 * r)), -whole / (2 * r)])


# Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [[0.0], [0.0, -1.0], [0.0, -1.0, -2.5]])
@pytest.mark.parametrize("weights", [data_weights, noise_weights])
def test_the_limits_of_the_step(weights, nodes):
    assert weights(math.inf, nodes) == [1.0, *[0.0] * (len(nodes) - 1)]
    assert weights(0.0, nodes) == [0.0] * len(nodes)
    tiny = weights(1e-9, nodes)
    assert tiny == pytest.approx([1e-9, *[0.0] * (len(nodes) - 1)], rel=1e-8, abs=1e-17)
    assert all(map(math.isfinite, weights(60.0, nodes)))


def test_a_node_where_nothing_was_left_has_no_say():
    one, two = step_weights(0.1, 0.6, (), 0.0, "exact"), step_weights(0.1, 0.6, (-0.3,), 0.0, "exact")
    assert step_weights(0.1, 0.6, (-math.inf,), 0.0, "exact") == (*one, 0.0)
    assert step_weights(0.1, 0.6, (-0.3, -math.inf), 0.0, "exact") == (*two, 0.0)
    assert step_weights(-math.inf, 0.6, (-math.inf,), 0.0, "exact") == (1.0, 0.0)
    assert step_weights(0.6, 0.6, (0.1,), 0.0, "exact") == (0.0, 0.0)
    assert step_weights(0.6, math.inf, (0.1,), 0.0, "half") == (1.0, 0.0)


@given(st.floats(0, 3), st.floats(0.01, 2), st.floats(0.1, 2))
def test_noise_makes_the_clock_run_faster(eta, h, before):
    """(4): the weights at eta are those of (1) with everything on the clock (1 + eta) lambda."""
    rate = 1 + eta
    want = data_weights(rate * h, [0.0, -rate * before])
    assert step_weights(0.2, 0.2 + h, (0.2 - before,), eta, "exact") == pytest.approx(want, rel=1e-9, abs=1e-12)
