"""Dequantisation: places within cells, their densities, and bounds that are known in closed form."""

import math

import pytest
import torch
from scipy import stats

from reverie.base.errors import UsageError
from reverie.diffusion.dequantisation import (
    Dequantiser,
    Logistic,
    Uniform,
    dtype_of,
    evaluating,
    log_cell,
    spread,
    train_dequantiser,
)
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.schedules import EDM

F64 = torch.float64
WIDE, NARROW = (127.2, 0.6), (127.0, 0.12)  # a pixel's mean and standard deviation, in levels


def picture_model(law):
    """Pixels of 2x2 pictures, each a Gaussian, and no blur to speak of."""
    center, std = law
    mean = torch.full((1, 1, 2, 2), center / 127.5 - 1, dtype=F64)
    return Mixture(mean, torch.full((1,), std / 127.5, dtype=F64), torch.ones(1, dtype=F64), EDM(sigma_min=1e-5))


def draw_pictures(count, law):
    return (127.5 * (picture_model(law).draw(count) + 1)).round().to(torch.uint8)


def log_masses(images, law):
    """The exact ln P of the pictures (B,)."""
    cdf = stats.norm(*law).cdf
    mass = cdf(images.double().numpy() + 0.5) - cdf(images.double().numpy() - 0.5)
    return torch.from_numpy(mass).log().flatten(1).sum(1)


def bounds(dequantiser, images, law, draws):
    """The bound for each picture and draw (B, K), by the exact density."""
    model, found = picture_model(law), []
    for draw in range(draws):
        with torch.no_grad():
            u, log_q = dequantiser.draw(images, [(i, draw) for i in range(len(images))])
        found.append(model.log_prob(spread(images, u.double())) + 4 * log_cell() - log_q)
    return torch.stack(found, 1)


def test_cells_are_centred_on_what_the_model_was_trained_on():
    k = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(spread(k, torch.full((256,), 0.5, dtype=F64)), k.double() / 127.5 - 1)
    edges = spread(k, torch.zeros(256, dtype=F64)), spread(k, torch.ones(256, dtype=F64))
    torch.testing.assert_close(edges[0][1:], edges[1][:-1])
    torch.testing.assert_close((edges[1] - edges[0]).log(), torch.full((256,), log_cell(), dtype=F64))


@pytest.mark.parametrize("dequantiser", [Uniform(), Logistic(1, 4)], ids=["uniform", "logistic"])
def test_a_place_is_fixed_by_its_own_key(dequantiser):
    assert isinstance(dequantiser, Dequantiser)
    images = draw_pictures(5, WIDE)
    u, log_q = dequantiser.draw(images, [(i, "a") for i in range(5)])
    assert u.shape == images.shape
    assert log_q.shape == (5,)
    assert bool(((u >= 0) & (u <= 1)).all())
    alone, alone_q = dequantiser.draw(images[3:4], [(3, "a")])
    torch.testing.assert_close(alone[0], u[3])
    torch.testing.assert_close(alone_q[0], log_q[3])
    assert not torch.equal(dequantiser.draw(images, [(i, "b") for i in range(5)])[0], u)


def test_the_logistic_ones_density_is_that_of_its_places():
    """E_q[1 / q(u)] is the length of [0, 1], and so it is on either half: z-tests, 1e-5 each."""
    torch.manual_seed(0)
    dequantiser = Logistic(1, 8)
    for parameter in dequantiser.last.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.full((4000, 1, 1, 1), 130, dtype=torch.uint8)
    with torch.no_grad():
        u, log_q = dequantiser.draw(images, [(i,) for i in range(len(images))])
    u, weight = u.flatten(), (-log_q).exp()
    assert weight.std() > 0.1
    for low, high in ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75)):
        inside = weight * ((u >= low) & (u < high))
        z = (inside.mean() - (high - low)) / (inside.std() / math.sqrt(len(u)))
        assert abs(z) < 4.5


def test_uniform_dequantisation_is_a_lower_bound_and_known():
    """E ln p within a cell in closed form, within 4.5 standard errors; below the exact pmf by more than them."""
    images = draw_pictures(64, WIDE)
    found = bounds(Uniform(), images, WIDE, 25)
    error = found.std(1) / 5
    center, std = WIDE
    want = -0.5 * ((images.double() - center).square() + 1 / 12) / std**2 - 0.5 * math.log(2 * math.pi * std**2)
    assert bool(((found.mean(1) - want.flatten(1).sum(1)).abs() < 4.5 * error).all())
    gap = log_masses(images, WIDE) - found.mean(1)
    assert bool((gap > -4.5 * error).all())
    assert gap.mean() > 0.3
    # A cell of the wrong width, or none, is no bound, or far from one.
    assert (gap + 4 * log_cell()).mean() < -10


def test_a_trained_one_is_a_bound_that_is_nearer():
    """Where the density is a spike within its cell, the gap over new pictures is less than a fifth of the uniform
    one's, and not below 0 by 4.5 standard errors."""
    torch.manual_seed(0)
    dequantiser, model = Logistic(1, 8), picture_model(NARROW)
    train_dequantiser(dequantiser, model, draw_pictures(512, NARROW), 60, batch_size=32, learning_rate=0.02)
    images = draw_pictures(560, NARROW)[512:]
    truth = log_masses(images, NARROW)[:, None]
    gaps = truth - bounds(dequantiser, images, NARROW, 16)
    before = (truth - bounds(Uniform(), images, NARROW, 16)).mean()
    assert before == pytest.approx(4 * 1.693, rel=0.05)
    assert gaps.mean() < before / 5
    assert gaps.mean() > -4.5 * (gaps.mean(1).std() / math.sqrt(len(images)))
    assert bool((gaps.mean(1) > -4.5 * gaps.std(1) / math.sqrt(16)).all())


def test_training_starts_nearly_uniform_and_leaves_the_model_as_it_is():
    dequantiser, model = Logistic(1, 4), picture_model(WIDE)
    _, log_q = dequantiser.draw(draw_pictures(256, WIDE), [(i,) for i in range(256)])
    assert 0 < log_q.mean() / 4 < 0.05  # the KL to the uniform, for each pixel
    model.train()
    train_dequantiser(dequantiser, model, draw_pictures(8, WIDE), 1, batch_size=4)
    assert model.training
    with pytest.raises(UsageError, match="steps is 0 and batch_size 64"):
        train_dequantiser(dequantiser, model, draw_pictures(8, WIDE), 0)


def test_the_models_dtype_and_mode():
    model = picture_model(WIDE)
    assert dtype_of(model, torch.float16) == torch.float16
    model.layer = torch.nn.Linear(1, 1)
    model.layer.eval()
    assert dtype_of(model, torch.float16) == torch.float32
    with evaluating(model):
        assert not model.training
    assert model.training
    assert not model.layer.training
