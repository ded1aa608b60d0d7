"""Power-function averages: profiles against quadrature, and any length rebuilt against the one that was tracked."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from reverie.base.errors import UsageError
from reverie.training.ema import PowerEMA
from reverie.training.power import LONGEST, Profile, combine, exponent_of, inner_product, length_of


def density(profile: Profile, x: float) -> float:
    g, t = profile
    return (g + 1) * x**g / t ** (g + 1) if 0 <= x <= t else 0.0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 6.94, 16.97, 60.0])
def test_the_length_is_the_profiles_standard_deviation(exponent):
    profile = Profile(exponent, 3.0)
    total, _ = quad(lambda x: density(profile, x), 0, 3)
    mean, _ = quad(lambda x: x * density(profile, x), 0, 3)
    square, _ = quad(lambda x: x * x * density(profile, x), 0, 3)
    assert total == pytest.approx(1)
    assert length_of(exponent) == pytest.approx(math.sqrt(square - mean**2) / 3, rel=1e-6)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.2886])
def test_length_and_exponent_are_inverses(length):
    assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)


def test_the_papers_exponents():
    """Section 3.1: 16.97 and 6.94 for 5 % and 10 %."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert exponent_of(LONGEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_lengths_that_there_are_not(length):
    with pytest.raises(UsageError, match=r"must be above 0 and at most 0\.2887"):
        exponent_of(length)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3.0, 5.0), (3.0, 5.0)), ((2.0, 4.0), (7.0, 9.0)), ((17.0, 9.0), (0.5, 2.0)), ((0.0, 1.0), (4.0, 1.0))],
)
def test_inner_products_against_quadrature(a, b):
    a, b = Profile(*a), Profile(*b)
    want, _ = quad(lambda x: density(a, x) * density(b, x), 0, min(a.updates, b.updates), epsabs=1e-13)
    assert inner_product(a, b) == pytest.approx(want, rel=1e-7)
    assert inner_product(b, a) == pytest.approx(inner_product(a, b), rel=1e-14)


def test_inner_products_of_long_runs_do_not_overflow():
    assert 0 < inner_product(Profile(60, 2e6), Profile(17, 1e6)) < 1


# The average itself -------------------------------------------------------------------------------


def scalar() -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
    return model


def test_each_update_has_the_share_of_the_profile_over_it():
    """Unit pulses: the average after t updates of a weight that was 1 at update k alone."""
    t, sigma = 30, 0.1
    g = exponent_of(sigma)
    for pulse in (1, 2, 15, 29, 30):
        model = scalar()
        ema = PowerEMA(model, sigma)
        for k in range(1, t + 1):
            model.w.data.fill_(float(k == pulse))
            ema.update(k - 1)
        want, _ = quad(lambda x: density(Profile(g, t), x), pulse - 1, pulse)
        assert float(ema.state()["w"]) == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_the_start_has_no_share():
    model = scalar()
    model.w.data.fill_(1e6)
    ema = PowerEMA(model, 0.2)
    model.w.data.fill_(3.0)
    ema.update(0)
    assert float(ema.state()["w"]) == 3.0
    assert ema.name == "ema-power-0.2"


# Any length afterwards ----------------------------------------------------------------------------


def walk(updates: int, size: int = 200, seed: int = 0) -> np.ndarray:
    """Weights of a run: an approach to somewhere, and the noise of small batches."""
    rng = np.random.default_rng(seed)
    w, goal, path = np.zeros(size), rng.standard_normal(size), []
    for t in range(updates):
        w = w + 0.3 / math.sqrt(1 + t / 50) * (0.1 * (goal - w) + 0.3 * rng.standard_normal(size))
        path.append(w.copy())
    return np.array(path)


def average(path: np.ndarray, g: float, t: int) -> np.ndarray:
    """Return the average by its profile, without a recursion."""
    edges = (np.arange(t + 1) / t) ** (g + 1)
    return np.diff(edges) @ path[:t]


@pytest.mark.parametrize("length", [0.02, 0.03, 0.05, 0.075, 0.12, 0.15, 0.2, 0.25])
def test_a_length_that_was_not_tracked_is_rebuilt_to_a_percent(length):
    """From 2 lengths and 40 moments of a run of 2000 updates."""
    updates, path = 2000, walk(2000)
    times = [50 * k for k in range(1, 41)]
    profiles = [Profile.of_length(s, t) for t in times for s in (0.05, 0.10)]
    kept = [average(path, p.exponent, int(p.updates)) for p in profiles]
    wanted = Profile.of_length(length, updates)
    found = combine(profiles, wanted)
    rebuilt = sum(share * w for share, w in zip(found.shares, kept, strict=True))
    truth = average(path, wanted.exponent, updates)
    limit = 0.01 if length >= 0.03 else 0.06  # shorter than what was kept by more than half
    assert np.linalg.norm(rebuilt - truth) < limit * np.linalg.norm(truth)
    assert found.error < (0.05 if length >= 0.03 else 0.5)
    assert sum(found.shares) == pytest.approx(1, abs=0.02)
    if length > 0.1:  # the nearest one that was kept is not it
        assert np.linalg.norm(kept[-1] - truth) > 2 * np.linalg.norm(rebuilt - truth)


def test_an_earlier_moment_is_rebuilt_too():
    path, times = walk(1000), [25 * k for k in range(1, 41)]
    profiles = [Profile.of_length(s, t) for t in times for s in (0.05, 0.10)]
    kept = [average(path, p.exponent, int(p.updates)) for p in profiles]
    wanted = Profile.of_length(0.13, 700)
    rebuilt = sum(s * w for s, w in zip(combine(profiles, wanted).shares, kept, strict=True))
    truth = average(path, wanted.exponent, 700)
    assert np.linalg.norm(rebuilt - truth) < 0.01 * np.linalg.norm(truth)


def test_one_that_was_kept_is_itself():
    profiles = [Profile.of_length(s, t) for t in (100, 200, 300) for s in (0.05, 0.10)]
    found = combine(profiles, profiles[3])
    assert found.shares == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-5)
    assert found.error < 1e-5


def test_the_error_is_that_of_the_profiles():
    """Against quadrature on a grid."""
    profiles = [Profile(7.0, 60.0), Profile(17.0, 100.0)]
    wanted = Profile(3.0, 100.0)
    found = combine(profiles, wanted)
    x = (np.arange(200_000) + 0.5) / 2000
    made = sum(s * np.array([density(p, 1.0) * 0 + (p.exponent + 1) * x**p.exponent / p.updates ** (p.exponent + 1)])
               * (x <= p.updates) for s, p in zip(found.shares, profiles, strict=True))  # fmt: skip
    truth = (wanted.exponent + 1) * x**wanted.exponent / wanted.updates ** (wanted.exponent + 1)
    assert found.error == pytest.approx(np.linalg.norm(made - truth) / np.linalg.norm(truth), rel=1e-3)


def test_without_snapshots():
    with pytest.raises(UsageError, match="no snapshots"):
        combine([], Profile(1, 1))
