"""Nearest neighbours, and what they say of copies: exact answers, and the rate of false alarms."""

import math

import pytest
import torch
from scipy import stats

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.evaluation import neighbours
from reverie.evaluation.neighbours import copying, flat, nearest, squared_distances

RATE = 1e-5


def test_nearest_is_that_of_all_distances(monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", 100)
    x, y = normal((37, 5), "x"), normal((41, 5), "y")
    distance, index = nearest(x, y)
    want = torch.cdist(x.double(), y.double()).min(1)
    assert torch.equal(index, want.indices)
    assert torch.allclose(distance, want.values, atol=1e-12)


def test_a_copy_is_at_zero_itself():
    """A difference of large squares would leave rounding; the distance is taken anew at the place found."""
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distance, index = nearest(flat(images[5:9]), flat(images))
    assert distance.tolist() == [0] * 4
    assert index.tolist() == [5, 6, 7, 8]


def test_distances_are_in_grey_levels():
    a = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert math.sqrt(float(squared_distances(flat(a), flat(a + 7)))) == pytest.approx(7, rel=1e-5)


def test_share_and_z_are_mann_whitneys():
    samples, held_out = normal((60,), "s").abs().mul(5).round(), normal((45,), "h").abs().mul(6).round()  # with ties
    got = copying(samples, held_out)
    u = stats.mannwhitneyu(held_out.numpy(), samples.numpy()).statistic
    assert got.share == pytest.approx(u / (60 * 45))
    assert got.z == pytest.approx((u - 60 * 45 / 2) / math.sqrt(60 * 45 * 106 / 12))
    assert got.standard_error == pytest.approx(math.sqrt(106 / (12 * 60 * 45)))


def test_draws_of_the_data_are_not_taken_for_copies():
    """|z| above 1.96 for one in twenty; of 400 repeats, to 1e-5: within the binomial's limits."""
    alarms = 0
    for i in range(400):
        points = normal((160, 3), "points", i)
        training, held_out, samples = points[:80], points[80:120], points[120:]
        alarms += abs(copying(nearest(samples, training)[0], nearest(held_out, training)[0]).z) > stats.norm.isf(0.025)
    # The two sets share the training points, which makes z a little wider than standard normal: 5 to 10 %.
    assert stats.binom.ppf(RATE / 2, 400, 0.03) <= alarms <= stats.binom.ppf(1 - RATE / 2, 400, 0.10)


def test_copies_are_found():
    points = normal((200, 10), "points")
    training, held_out = points[:100], points[100:]
    copies = training[:40] + 0.01 * normal((40, 10), "blur")
    got = copying(nearest(copies, training)[0], nearest(held_out, training)[0])
    assert got.share == 1
    assert got.z > 8


def test_refusals():
    with pytest.raises(UsageError, match="0 samples and 3 held-out"):
        copying(torch.zeros(0), torch.zeros(3))
