"""Bits/dim of models whose truth is known: within 0.01 nats for each dimension, by the ODE and by the bound."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.schedules import Flow, table
from reverie.evaluation.likelihood import bound_bits, flow_bits

F64 = torch.float64
LN2 = math.log(2)


def levels(schedule, modes=2):
    """A mixture in four dimensions whose modes are many grey levels wide, so that a cell's density is its mass."""
    means = torch.tensor([[0.3, -0.2, 0.1, 0.0], [-0.4, 0.1, 0.0, 0.3]], dtype=F64)[:modes]
    return Mixture(means, torch.tensor([0.08, 0.15], dtype=F64)[:modes], torch.tensor([0.6, 0.4], dtype=F64)[:modes],
                   schedule)  # fmt: skip


def drawn(oracle, count):
    """Bytes that the oracle draws, and their true bits/dim: -log2 of the density times the cells."""
    images = (127.5 * oracle.draw(count, seed=3) + 127.5).round().clamp(0, 255).to(torch.uint8)
    x = images.double() / 127.5 - 1
    return images, (4 * math.log(127.5) - oracle.log_prob(x)) / (4 * LN2)


@pytest.mark.parametrize("modes", [1, 2])
@pytest.mark.parametrize("probes", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_by_the_ode_within_a_hundredth_of_a_nat(modes, probes):
    oracle = levels(Flow(), modes)
    images, truth = drawn(oracle, 96)
    got = flow_bits(oracle, images, probes=probes, tolerance=1e-5, batch_size=40)
    allowed = 0.01 / LN2 + (4 * got.standard_error / 10 if probes else 0)
    assert abs(got.value - float(truth.mean())) < allowed
    assert got.n == 96
    assert got.standard_error == pytest.approx(float(truth.std()) / math.sqrt(96), rel=0.15)
    assert got.dequantisation == "uniform over each byte's cell of 1/127.5"


def test_the_batch_has_no_say():
    oracle = levels(Flow())
    images, _ = drawn(oracle, 10)
    one, other = (flow_bits(oracle, images, probes=2, draws=2, batch_size=size, seed=5) for size in (3, 10))
    assert one.value == pytest.approx(other.value, abs=1e-9)
    assert one.own_error == pytest.approx(other.own_error, abs=1e-9)
    assert one.own_error > 0


def test_the_bound_is_above_the_truth_and_near():
    """Of the large variance, at T = 250: what it is too much is DDPM's steps' own."""
    oracle = levels(table("linear", timesteps=250), 1)
    images, truth = drawn(oracle, 48)
    got = bound_bits(oracle, images, batch_size=48)
    noise = 3 * float(truth.std()) / math.sqrt(48) / 10
    assert -noise < got.value - float(truth.mean()) < 0.5
    assert got.evaluations == 250
    assert got.dequantisation is None


def test_progress_is_told():
    oracle, told = levels(Flow()), []
    images, _ = drawn(oracle, 7)
    flow_bits(oracle, images, batch_size=3, tick=told.append)
    assert told == [3, 6, 7]


def test_refusals():
    oracle = levels(Flow())
    images, _ = drawn(oracle, 2)
    with pytest.raises(UsageError, match="a table"):
        bound_bits(oracle, images)
    with pytest.raises(UsageError, match="0 images"):
        flow_bits(oracle, images[:0])
