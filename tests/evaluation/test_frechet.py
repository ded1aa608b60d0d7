"""The Frechet distance against closed forms, another library's matrix root, and its own sampling error."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import normal
from reverie.evaluation.frechet import Moments, frechet, frechet_distance, frechet_with_error


def covariance(dimensions: int, *key: int | str, rank: int | None = None) -> Tensor:
    """A random covariance (D, D) of the given rank, in float64."""
    factor = normal((dimensions, rank or 2 * dimensions), "covariance", *key).double()
    return factor @ factor.T / factor.shape[1]


def mean(dimensions: int, *key: int | str) -> Tensor:
    return normal((dimensions,), "mean", *key).double()


# Closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 64, 128])
def test_equal_gaussians_are_at_zero_to_rounding(rank):
    """A root taken of a product of covariances would leave about 1e-8 here, and more for low ranks."""
    cov = covariance(64, rank, rank=rank)
    assert frechet_distance(mean(64), cov, mean(64), cov) < 1e-12


def test_a_shift_counts_as_its_square():
    cov = covariance(8)
    assert frechet_distance(mean(8), cov, mean(8) + 2, cov) == pytest.approx(8 * 4, rel=1e-12)


def test_diagonal_covariances_differ_by_their_standard_deviations():
    a, b = mean(16, "a").abs(), mean(16, "b").abs()
    got = frechet_distance(mean(16), a.square().diag(), mean(16), b.square().diag())
    assert got == pytest.approx(float((a - b).square().sum()), rel=1e-12)


def test_commuting_covariances_differ_by_the_roots_of_their_eigenvalues():
    axes = torch.linalg.qr(normal((12, 12), "axes").double())[0]
    a, b = mean(12, "a").abs(), mean(12, "b").abs()
    got = frechet_distance(mean(12), axes @ a.square().diag() @ axes.T, mean(12), axes @ b.square().diag() @ axes.T)
    assert got == pytest.approx(float((a - b).square().sum()), rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), dimensions=st.integers(1, 24))
def test_agrees_with_scipys_matrix_root(seed, dimensions):
    a, b = covariance(dimensions, seed, "a"), covariance(dimensions, seed, "b")
    shift = mean(dimensions, seed, "a") - mean(dimensions, seed, "b")
    root = np.real(scipy.linalg.sqrtm((a @ b).numpy()))
    want = float(shift.square().sum() + a.trace() + b.trace()) - 2 * float(np.trace(root))
    got = frechet_distance(mean(dimensions, seed, "a"), a, mean(dimensions, seed, "b"), b)
    assert got == pytest.approx(want, rel=1e-8)


def test_singular_covariances_have_a_distance():
    """Two lines in a plane at an angle: tr + tr - 2 |cos|."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = torch.stack([angle.cos(), angle.sin()])
    zero = torch.zeros(2)
    got = frechet_distance(zero, torch.outer(one, one), zero, torch.outer(other, other))
    assert got == pytest.approx(2 - 2 * float(angle.cos()), rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_is_a_metric(seed):
    """Its root is symmetric and keeps the triangle inequality."""
    a, b, c = ((mean(6, seed, k), covariance(6, seed, k)) for k in "abc")
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)
    ab, bc, ac = (math.sqrt(frechet_distance(*p, *q)) for p, q in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-9


def test_single_precision_is_computed_in_double():
    cov = covariance(64).float()
    assert frechet_distance(mean(64).float(), cov, mean(64).float(), cov) < 1e-12


# Refusals -------------------------------------------------------------------------------------


def test_refuses_what_is_no_covariance():
    zero, one = torch.zeros(2), torch.eye(2)
    with pytest.raises(UsageError, match="covariance b is not symmetric"):
        frechet_distance(zero, one, zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(UsageError, match="covariance a has the eigenvalue -1"):
        frechet_distance(zero, torch.diag(torch.tensor([1.0, -1.0])), zero, one)


def test_refuses_spaces_that_differ():
    with pytest.raises(UsageError, match=r"2 and 3 dimensions.*one feature space"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
    with pytest.raises(UsageError, match="of 2 and of 3 dimensions"):
        Moments.of(torch.ones(4, 2)) + Moments.of(torch.ones(4, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_what_is_not_finite(bad):
    features = torch.ones(5, 2)
    features[3, 1] = bad
    with pytest.raises(NonFiniteError, match="1 of 5 samples are not finite, first 3"):
        Moments.of(features)
    with pytest.raises(NonFiniteError, match="mean"):
        frechet_distance(torch.tensor([bad, 0]), torch.eye(2), torch.zeros(2), torch.eye(2))
    with pytest.raises(NonFiniteError, match="covariance b"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2) * bad)


def test_refuses_too_few_samples():
    with pytest.raises(UsageError, match="no features"):
        Moments.of(torch.ones(0, 2))
    with pytest.raises(UsageError, match="at least one batch"):
        Moments.over([])
    with pytest.raises(UsageError, match="covariance of one sample"):
        frechet(torch.ones(1, 2), torch.ones(5, 2))
    with pytest.raises(UsageError, match="39 and 100 samples in 20 groups"):
        frechet_with_error(torch.ones(39, 2), torch.ones(100, 2))


# Moments --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), seed=st.integers(0, 10**6))
def test_moments_of_batches_are_those_of_the_whole(sizes, seed):
    x = normal((sum(sizes), 3), seed).double() * 5 + 100
    got = Moments.over(x.split(sizes))
    assert got.count == len(x)
    torch.testing.assert_close(got.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.covariance, x.T.cov(), rtol=1e-9, atol=1e-9)


def test_moments_far_from_the_origin_keep_their_digits():
    """The textbook form, mean of squares less square of mean, loses all digits of this covariance."""
    x = normal((1000, 2), "far").double()
    far = Moments.over((x + 1e9).split(100)).covariance
    torch.testing.assert_close(far, x.T.cov(), rtol=1e-5, atol=1e-5)


# Samples --------------------------------------------------------------------------------------


def draw(count: int, seed: int, name: str, shift: float = 0.0) -> Tensor:
    return normal((count, 8), seed, name) + shift


def test_samples_of_one_distribution_come_close_as_they_grow():
    small, large = (frechet(draw(n, 0, "a"), draw(n, 0, "b")) for n in (200, 20_000))
    assert large < small / 20  # the bias falls as 1 / n


def test_bias_is_estimated():
    """True distance 8 x 0.5^2 = 2. Over 40 repetitions the raw mean lies above it by its bias; the corrected
    one within 4 standard errors of it: a false alarm in about 1 in 15,000."""
    repetitions = [frechet_with_error(draw(120, s, "a", 0.5), draw(120, s, "b"), groups=10) for s in range(40)]
    raw = torch.tensor([r.value for r in repetitions])
    corrected = torch.tensor([r.corrected for r in repetitions])
    error = float(corrected.std()) / math.sqrt(len(corrected))
    assert float(raw.mean()) > 2 + 4 * error
    assert abs(float(corrected.mean()) - 2) < 4 * error + 0.02  # the second order of the bias


def test_standard_error_is_the_spread_of_repetitions():
    """The spread of 60 repetitions is known to about 9 %, the jackknife's variance is a little too large."""
    repetitions = [frechet_with_error(draw(300, s, "a", 0.5), draw(300, s, "b"), groups=20) for s in range(60)]
    spread = float(torch.tensor([r.value for r in repetitions]).std())
    claimed = math.sqrt(sum(r.standard_error**2 for r in repetitions) / len(repetitions))
    assert 0.7 < claimed / spread < 1.5


def test_error_does_not_depend_on_the_order_of_the_samples():
    """Samples sorted by class must not look as if the groups differed."""
    x = torch.cat([draw(300, 0, "x"), draw(300, 0, "y", 3.0)])
    mixed = x[torch.arange(600).reshape(2, 300).T.flatten()]
    real = draw(600, 0, "b", 1.5)
    sorted_, mixed_ = frechet_with_error(x, real), frechet_with_error(mixed, real)
    assert sorted_.value == pytest.approx(mixed_.value, rel=1e-9)
    assert sorted_.standard_error == pytest.approx(mixed_.standard_error, rel=0.5)
