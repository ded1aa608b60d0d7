"""The gap between training and held-out loss: none for an oracle of the data, a large one for one of the images."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.schedules import Flow
from reverie.evaluation.gap import denoising_losses, gap

F64 = torch.float64


def bytes_of(x):
    return (127.5 * x + 127.5).round().clamp(0, 255).to(torch.uint8)


def test_a_model_of_the_data_has_no_gap_and_a_model_of_its_images_has():
    x = 0.3 * normal((400, 6), "data").double()
    training, held_out = bytes_of(x[:200]), bytes_of(x[200:])
    data = Mixture(torch.zeros(1, 6, dtype=F64), torch.tensor([0.3], dtype=F64), torch.ones(1, dtype=F64), Flow())
    known = training.double() / 127.5 - 1
    images = Mixture(known, torch.full((200,), 0.01, dtype=F64), torch.ones(200, dtype=F64), Flow())
    one, other = (
        gap(denoising_losses(model, training, name="training"), denoising_losses(model, held_out, name="held-out"))
        for model in (data, images)
    )
    assert abs(one.value) < 4.4 * one.standard_error  # false alarms: 1e-5
    assert other.value > 10 * other.standard_error


def test_the_noise_is_each_images_own_whatever_the_batch():
    x = bytes_of(0.3 * normal((10, 6), "data"))
    data = Mixture(torch.zeros(1, 6, dtype=F64), torch.tensor([0.3], dtype=F64), torch.ones(1, dtype=F64), Flow())
    assert torch.allclose(denoising_losses(data, x, batch_size=3), denoising_losses(data, x, batch_size=10))


def test_the_error_is_that_of_two_means():
    a, b = normal((30,), "a"), normal((40,), "b")
    want = (a.double().var() / 30 + b.double().var() / 40).sqrt()
    assert gap(a, b).standard_error == pytest.approx(float(want))


def test_a_single_image_tells_nothing():
    with pytest.raises(UsageError, match="two of each"):
        gap(torch.zeros(1), torch.zeros(5))
