"""Precision, recall, density and coverage: of sets whose answer is plain, by brute force, and by the library."""

import math
from types import ModuleType

import pytest
import torch
from scipy import stats

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.evaluation import manifold as module
from reverie.evaluation.manifold import manifold, squared_radii

NAMES = ("precision", "recall", "density", "coverage")


def four(real, samples, k=5):
    got = manifold(real, samples, k)
    return {name: getattr(got, name)[0] for name in NAMES}


def brute(real, samples, k):
    """The four, by loops over the definitions."""

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real, samples = real.tolist(), samples.tolist()
    about_real = [radius(real, i) for i in range(len(real))]
    about_samples = [radius(samples, j) for j in range(len(samples))]
    inside = [[math.dist(y, x) < r for x, r in zip(real, about_real, strict=True)] for y in samples]
    recalled = [any(math.dist(x, y) < r for y, r in zip(samples, about_samples, strict=True)) for x in real]
    return {
        "precision": sum(map(any, inside)) / len(samples),
        "recall": sum(recalled) / len(real),
        "density": sum(map(sum, inside)) / (k * len(samples)),
        "coverage": sum(map(any, zip(*inside, strict=True))) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_agrees_with_brute_force(k, shift, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 200)  # several chunks
    real, samples = normal((41, 3), "real", k).double(), normal((33, 3), "samples", k).double() + shift
    assert four(real, samples, k) == pytest.approx(brute(real, samples, k), abs=1e-12)


def test_agrees_with_the_papers_own_library():
    prdc: ModuleType = pytest.importorskip("prdc", reason="pip install prdc")
    real, samples = normal((300, 8), "real").numpy(), 0.9 * normal((250, 8), "samples").numpy() + 0.2
    theirs = prdc.compute_prdc(real_features=real, fake_features=samples, nearest_k=5)
    assert four(torch.from_numpy(real), torch.from_numpy(samples)) == pytest.approx(theirs, abs=1e-9)


def test_the_same_points_have_all_of_it():
    points = normal((60, 2), "points")
    got = four(points, points)
    assert (got["precision"], got["recall"], got["coverage"]) == (1, 1, 1)


def test_points_far_away_have_nothing_of_it():
    points = normal((60, 2), "points")
    assert four(points, points + 1000) == dict.fromkeys(NAMES, 0)


def test_half_of_the_modes_is_precise_and_half_recalled():
    """Real points in two clusters, samples in one of them: all samples are like the data, half the data is there."""
    one, other = normal((50, 2), "one"), normal((50, 2), "other") + 1000
    got = four(torch.cat([one, other]), one + 1e-3)
    assert got["precision"] == 1
    assert got["recall"] == got["coverage"] == 0.5


def test_half_of_the_samples_astray_is_half_the_precision_and_full_coverage():
    real = normal((50, 2), "real")
    got = four(real, torch.cat([real + 1e-3, real + 1000]))
    assert got["precision"] == 0.5
    assert got["coverage"] == 1


def test_an_outlier_of_the_data_makes_precision_and_little_density():
    """Naeem et al.'s example: the ball of one real point far away holds samples that nothing else is near."""
    real = torch.cat([normal((99, 1), "real") * 0.01, torch.tensor([[100.0]])])
    got = four(real, torch.full((20, 1), 60.0), k=1)
    assert got["precision"] == 1
    assert got["density"] == pytest.approx(1)  # a single ball, k = 1
    assert got["coverage"] == pytest.approx(0.01)


def test_coverage_of_equal_distributions_is_as_the_paper_says():
    """1 - prod_(i<k) (N - 1 - i) / (M + N - 1 - i), whatever the distribution: over 40 repeats, to 1e-5."""
    n, m, k = 60, 80, 3
    want = 1 - math.prod((n - 1 - i) / (m + n - 1 - i) for i in range(k))
    values = torch.tensor([four(normal((n, 5), "n", i), normal((m, 5), "m", i), k)["coverage"] for i in range(40)])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - want) < stats.t.isf(0.5e-5, 39) * error


def test_the_error_is_that_of_a_share():
    real = normal((200, 2), "real")
    got = manifold(real, torch.cat([real[:100] + 1e-3, real[:100] + 1000]))
    assert got.precision == pytest.approx((0.5, math.sqrt(0.25 / 199)))


def test_refusals():
    points = normal((6, 2), "points")
    with pytest.raises(UsageError, match="6th neighbour of each of 6"):
        squared_radii(points, 6)
    with pytest.raises(UsageError, match="2 and of 1 dimensions"):
        manifold(points, points[:, :1], 2)
