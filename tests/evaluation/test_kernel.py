"""The kernel distance against its closed form, its lack of bias, and its rate of false alarms."""

import math

import pytest
import torch
from scipy import stats

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import normal
from reverie.evaluation.kernel import kernel_distance, squared_mmd

RATE = 1e-5


def naive(x, y):
    """Equation (2), pair by pair."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_the_estimate_is_that_of_the_pairs():
    x, y = normal((7, 3), "x").double(), normal((9, 3), "y").double() + 0.5
    assert squared_mmd(x, y) == pytest.approx(naive(x, y), rel=1e-12)


def truth(mean, std):
    """MMD^2 of N(0, 1) and N(mean, std^2) in one dimension: (xy + 1)^3 is 1 + 3 xy + 3 (xy)^2 + (xy)^3."""
    moments = [mean, mean**2 + std**2, mean**3 + 3 * mean * std**2]
    return sum(c * (a - b) ** 2 for c, a, b in zip((3, 3, 1), (0, 1, 0), moments, strict=True))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.5), (-0.3, 0.7)])
def test_right_on_average_at_any_number_of_samples(mean, std):
    """Twelve samples in two blocks: a V-statistic would be off by more than its error here. False alarms: 1e-5."""
    repeats = 500
    x = normal((repeats, 12, 1), "x", int(10 * mean), int(10 * std)).double()
    y = mean + std * normal((repeats, 14, 1), "y", int(10 * mean), int(10 * std)).double()
    values = torch.tensor([kernel_distance(a, b, blocks=2).value for a, b in zip(x, y, strict=True)])
    error = float(values.std()) / math.sqrt(repeats)
    assert abs(float(values.mean()) - truth(mean, std)) < stats.norm.isf(RATE / 2) * error


def test_equal_distributions_are_told_apart_as_seldom_as_students_t_says():
    """|value| above t's 97.5 % in errors of 10 blocks: 5 % of the time. Of 300 repeats, to 1e-5."""
    repeats, limit = 300, stats.t.isf(0.025, 9)
    x, y = normal((2, repeats, 200, 4), "equal").double()
    got = [kernel_distance(a, b, seed=i) for i, (a, b) in enumerate(zip(x, y, strict=True))]
    alarms = sum(abs(one.value) > limit * one.standard_error for one in got)
    low, high = stats.binom.ppf([RATE / 2, 1 - RATE / 2], repeats, 0.05)
    assert low <= alarms <= high


def test_other_distributions_are_told_apart():
    """The power: a shift of half a standard deviation in one of four dimensions, at 1000 samples."""
    x, y = normal((2, 1000, 4), "shift").double()
    y[:, 0] += 0.5
    got = kernel_distance(x, y)
    assert got.value > 3 * got.standard_error


def test_refusals():
    x = normal((50, 3), "x")
    with pytest.raises(UsageError, match="3 and of 2 dimensions"):
        kernel_distance(x, x[:, :2])
    with pytest.raises(UsageError, match="5 samples for each"):
        kernel_distance(x[:40], x)
    with pytest.raises(NonFiniteError):
        kernel_distance(x, torch.where(x > 1, torch.nan, x))
