"""Easy consistency tuning: the gap's schedule, what the loss is at its two ends, and where its minimum lies."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.few_step.common import distance, noise_ratio, time_of_ratio
from reverie.diffusion.few_step.easy_consistency import EasyConsistency
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import schedules
from reverie.diffusion.schedules import EDM

F64 = torch.float64


@pytest.mark.parametrize("name", ["edm", "cosine", "flow"])
@pytest.mark.parametrize(("step", "a"), [(0, 0), (99, 0), (100, 1), (799, 7), (5000, 7)])
def test_the_gap_is_the_papers(name, step, a):
    schedule, tuning = schedules[name](), EasyConsistency(steps=800)
    tuning.begin(step)
    s = torch.tensor([0.05, 0.7, 3.0, 60.0], dtype=F64)
    t = time_of_ratio(schedule, s)
    due = (s * (1 - 2.0 ** -(a + 1) * (1 + 8 / (1 + s.exp())))).clamp(min=0)
    r = tuning.earlier(schedule, t)
    expected = torch.where(time_of_ratio(schedule, due) >= schedule.t_min, due, 0)
    torch.testing.assert_close(noise_ratio(schedule, r), expected, rtol=1e-5, atol=1e-8)
    assert bool((r < t).all())


def test_where_r_is_0_it_trains_a_denoiser(power, normal_pairs):
    x0, eps, _ = normal_pairs(4)
    t = torch.full((len(x0),), 0.1 / 80, dtype=F64)  # so little noise that r is 0
    denoiser = power(0.7)
    loss = EasyConsistency(steps=10)(denoiser, x0, t, eps)
    x = diffuse(denoiser.schedule, x0, t, eps)
    torch.testing.assert_close(loss, distance(denoiser(x, t).x0, x0) / 0.1)


def test_the_minimum_goes_from_the_posterior_mean_to_the_probability_flow_map(slope):
    """Of the family x_0 ~ (d^2 / (d^2 + s^2))^p: at r = 0 it is at p = 1; as r -> t it comes to p = 1/2."""
    first, last = EasyConsistency(steps=1, width=100.0), EasyConsistency(steps=1000, stages=12, width=100.0)
    last.begin(999)
    assert slope(first, 0.9, 0.3) < 0 < slope(first, 1.1, 0.3)
    assert slope(last, 0.45, 0.3) < 0 < slope(last, 0.55, 0.3)
    assert abs(slope(last, 0.5, 0.3)) < 0.02 * slope(last, 0.55, 0.3)


def test_a_target_of_its_own_is_asked(power, normal_pairs):
    x0, eps, _ = normal_pairs(3)
    t = torch.full((len(x0),), 0.5, dtype=F64)
    own = EasyConsistency(steps=1)(power(0.5), x0, t, eps)
    same = EasyConsistency(steps=1, target=power(0.5))(power(0.5), x0, t, eps)
    other = EasyConsistency(steps=1, target=power(0.9))(power(0.5), x0, t, eps)
    assert torch.equal(own, same)
    assert not torch.equal(own, other)


def test_both_networks_drop_the_same(normal_pairs):
    class Dropping(torch.nn.Module):
        def forward(self, x, time):
            return torch.nn.functional.dropout(torch.ones_like(x))

    torch.manual_seed(0)
    denoiser = NetworkDenoiser(Dropping(), EDM(), "x0")
    x0 = torch.zeros(1, 400, dtype=F64)
    loss = EasyConsistency(steps=1)(denoiser, x0, torch.tensor([0.5], dtype=F64), torch.ones_like(x0))
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "stages": 0}, "stages 0"),
        ({"steps": 1, "q": 1.0}, "q must be above 1"),
        ({"steps": 1, "k": -1.0}, "at least 0"),
        ({"steps": 1, "width": 0.0}, "must be positive"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        EasyConsistency(**options)
