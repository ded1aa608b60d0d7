"""One step: what it draws, what it believes, what it leaves alone."""

import math

import pytest
import torch
from torch.optim import AdamW

from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.objectives import Simple
from reverie.diffusion.schedules import linear
from reverie.diffusion.times import UniformTimes
from reverie.models.conditioning import Told
from reverie.networks.unet import UNet, UNetConfig
from reverie.training.config import TrainConfig
from reverie.training.update import SETTLED, Update, draw_examples, seeded


def make(**settings) -> Update:
    config = TrainConfig(out="x", **({"batch_size": 4, "warmup": 0} | settings))
    with seeded(True, 0, "test"):
        network = UNet(UNetConfig(in_channels=1, out_channels=1, channels=(8,), layers=1, dropout=config.dropout))
        for parameter in network.parameters():  # some begin at zero and would hide what stands before them
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = NetworkDenoiser(network, linear(), "eps")
    optimizer = AdamW(network.parameters(), lr=1e-3)
    return Update(denoiser, Simple("eps"), UniformTimes(denoiser.schedule), optimizer, config, 1e-3)


def examples(update: Update, step: int = 0, count: int = 4):
    images = torch.arange(count * 16, dtype=torch.uint8).reshape(count, 1, 4, 4) * 3
    return draw_examples(images, None, range(step * count, (step + 1) * count), update.times, step, update.config)


def weights(update: Update) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in update.parameters]


def test_what_is_drawn_depends_on_the_position_alone():
    update = make()
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    one = draw_examples(images, None, [5, 6, 7], update.times, 0, update.config)
    other = draw_examples(images[:1], None, [7], update.times, 9, update.config)
    assert torch.equal(one.eps[2], other.eps[0])


def test_labels_are_hidden_at_the_rate_asked_for():
    """2,000 labels at rate 0.25: within 4.5 standard errors, a false alarm in 150,000."""
    update = make(label_dropout=0.25)
    images, labels = torch.zeros(2000, 1, 1, 1, dtype=torch.uint8), torch.zeros(2000, dtype=torch.int64)
    told = Told({"label": labels}, {"label": torch.full_like(labels, 10)})
    drawn = draw_examples(images, told, range(2000), update.times, 0, update.config)
    hidden = float((drawn.condition["label"] == 10).double().mean())
    assert abs(hidden - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 2000)


def test_a_step_in_parts_is_the_step_at_once():
    whole, parts = make(), make(accumulate=4)
    losses = [update.backward(examples(update), 0) for update in (whole, parts)]
    torch.testing.assert_close(*losses)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    update = make()
    update(examples(update), 0)
    before, moments = weights(update), [s["exp_avg"].clone() for s in update.optimizer.state.values()]
    bad = examples(update, 1)
    if poison == "loss":
        bad.x0[1, 0, 2, 2] = float("nan")
    else:
        update.parameters[3].register_hook(lambda gradient: gradient * float("inf"))
    report = update(bad, 1)
    assert report.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, weights(update), strict=True))
    after = [s["exp_avg"] for s in update.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert update.counted == 1


def test_a_spike_is_skipped_once_the_mean_is_settled():
    update = make(spike=5.0)
    update.mean_norm, update.counted = 1e-3, SETTLED
    report = update(examples(update), 0)
    assert "running mean" in report.skipped
    update.counted = SETTLED - 1
    assert not update(examples(update), 0).skipped


def test_dropout_is_a_function_of_the_step_and_leaves_the_callers_state_alone():
    one, two = make(dropout=0.5), make(dropout=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = one(examples(one), 3).loss
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert two(examples(two), 3).loss == first
    three = make(dropout=0.5)
    assert three(examples(three, 0), 4).loss != first
