"""Zero-shot editing: what is known stays, and of a Gaussian the rest comes out as its conditional has it."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.grids import angle
from reverie.diffusion.guidance.zero_shot import Blocks, Grey, Known, Pixels, between
from reverie.diffusion.oracles import Gaussian
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.consistency import Consistency
from reverie.diffusion.schedules import EDM

F64 = torch.float64
SHAPE = (3, 4, 4)
MASK = (torch.arange(16) % 3 > 0).double().reshape(1, 1, 4, 4)
MEASUREMENTS = {"pixels": Pixels(MASK), "grey": Grey(), "blocks": Blocks(2)}


@pytest.fixture(params=MEASUREMENTS)
def measurement(request):
    return MEASUREMENTS[request.param]


def pictures(count, seed=0):
    return normal((count, *SHAPE), seed, "pictures").double()


def test_a_measurement_has_orthonormal_rows(measurement):
    """M M^T = 1, M^T is the transpose of M, and what was put is found again."""
    x, other = pictures(4), pictures(4, 1)
    y = measurement.measure(x)
    torch.testing.assert_close(measurement.measure(measurement.spread(y)), y)
    torch.testing.assert_close((measurement.measure(other) * y).sum(), (other * measurement.spread(y)).sum())
    torch.testing.assert_close(measurement.measure(measurement.put(other, y)), y)


def test_putting_moves_as_little_as_possible(measurement):
    x, other = pictures(4), pictures(4, 1)
    put = measurement.put(other, measurement.measure(x))
    torch.testing.assert_close(((put - other) * (x - put)).sum(), torch.zeros((), dtype=F64), atol=1e-9, rtol=0)


def test_edits_agree_with_what_is_known_and_look_like_the_data(measurement):
    """Pictures of one factor: the best guess of what is missing is known, and the edit is nearer to it than chance."""
    loading = pictures(1, 5).flatten()
    oracle = Gaussian(
        torch.zeros(SHAPE, dtype=F64), torch.outer(loading, loading) + 0.01 * torch.eye(48, dtype=F64), EDM()
    )
    truth = oracle.draw(8, 3)
    y = measurement.measure(truth)
    exact = Exact(oracle)
    grid = angle(oracle.schedule, 12)
    edited = sample(Consistency(), Known(exact, measurement, y), SHAPE, grid, Noise(range(8))).double()
    free = sample(Consistency(), exact, SHAPE, grid, Noise(range(8))).double()
    torch.testing.assert_close(measurement.measure(edited), y, rtol=1e-4, atol=1e-4)
    assert (edited - truth).square().mean() < 0.1 * (free - truth).square().mean()


def test_inpainting_of_a_gaussian_goes_towards_its_conditional_mean():
    """Two pixels of correlation 0.9, one known: 4000 edits of 30 rounds; the other's mean would be 1.35, and is 1.19.

    4.5 standard errors are 0.03, a false alarm in 150,000.
    """
    oracle = Gaussian(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64), EDM())
    known = Known(Exact(oracle), Pixels(torch.tensor([1.0, 0.0])), torch.tensor([[1.5, 0.0]]))

    class Bulk(Noise):
        def __call__(self, shape, draws):
            return normal((len(draws), *shape), 7, "bulk", draws[0])

    edited = sample(Consistency(), known, (2,), angle(EDM(), 30), Bulk(range(4000)))
    assert torch.equal(edited[:, 0], torch.full((4000,), 1.5))
    assert edited[:, 1].mean().item() == pytest.approx(1.19, abs=0.03)


def test_one_measurement_may_be_for_all_and_no_other_number():
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5, dtype=F64)
    oracle = Gaussian(torch.zeros(2), torch.eye(2), EDM())
    pixels = Pixels(torch.tensor([1.0, 0.0]))
    assert Known(oracle, pixels, torch.ones(1, 2))(x, t).x0[:, 0].tolist() == [1, 1, 1]
    with pytest.raises(UsageError, match="2 pictures were measured"):
        Known(oracle, pixels, torch.ones(2, 2))(x, t)


def test_the_noise_agrees_with_the_estimate():
    oracle, x = Gaussian(torch.zeros(2), torch.eye(2), EDM()), torch.tensor([[3.0, -1.0]])
    t = torch.tensor([0.02], dtype=F64)
    estimate = Known(oracle, Pixels(torch.tensor([1.0, 0.0])), torch.ones(1, 2))(x, t)
    torch.testing.assert_close(estimate.x0 + 80 * 0.02 * estimate.eps, x)


def test_between_keeps_the_length_of_noise():
    first, second = normal((6, 50, 50), 0, "a"), normal((6, 50, 50), 0, "b")
    share = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    way = between(first, second, share)
    torch.testing.assert_close(way[0], first[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(way[-1], second[-1], atol=1e-5, rtol=1e-4)
    lengths = way.flatten(1).norm(dim=1)
    assert (lengths / 50 - 1).abs().max() < 0.06
    torch.testing.assert_close(between(first, first, share), first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pixels(torch.tensor([0.5])), "1 where a pixel is known"),
        (lambda: Grey((0.0, 0.0)), "not all 0"),
        (lambda: Grey((math.nan,)), "finite"),
        (lambda: Blocks(0), "at least 1"),
        (lambda: Blocks(3).measure(torch.zeros(1, 1, 4, 4)), "3 does not divide"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()
