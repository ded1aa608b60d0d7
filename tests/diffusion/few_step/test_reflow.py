"""Reflow: the pairs are the teacher's, and a straight coupling has no loss."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.few_step.reflow import Reflow
from reverie.diffusion.grids import trailing
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.schedules import Flow

F64 = torch.float64


class Straight(Denoiser):
    """What knows the pairs (x_0(eps), eps) of a Gaussian's flow, and goes straight between them."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle, self.schedule = oracle, oracle.schedule

    def forward(self, x, t, condition=None):
        alpha, sigma = (per_sample(value, x) for value in self.schedule.marginal(t))
        mean, root = self.oracle.center, self.oracle.values.sqrt()
        along = (x - alpha * mean) @ self.oracle.basis / (alpha * root + sigma)  # eps, in the eigenbasis
        eps = along @ self.oracle.basis.mT
        return Estimate(mean + (root * along) @ self.oracle.basis.mT, eps)


@pytest.mark.parametrize("name", ["flow", "cosine-continuous", "edm"])
def test_the_partner_of_noise_is_where_the_flow_takes_it(name, gaussian):
    oracle = gaussian(schedules[name]())
    eps = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    one = torch.ones(20, dtype=F64)
    due = oracle.flow(oracle.schedule.prior_std(one)[:, None] * eps, one, 0 * one)
    errors = [(Reflow(oracle, steps=n).partner(eps) - due).abs().max().item() for n in (16, 64)]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.02


def test_a_straight_coupling_has_no_loss_and_needs_one_step(gaussian):
    oracle = gaussian(Flow())
    straight = Straight(oracle)
    eps = torch.randn(9, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 9, dtype=F64)
    assert Reflow(oracle, steps=256)(straight, eps, t, eps).max() < 1e-6
    assert Reflow(oracle, steps=16)(oracle, eps, t, eps).mean() > 1e-3  # the oracle of independent pairs is not it
    one = torch.ones(3, dtype=F64)
    x = sample(DDIM(), straight, (2,), trailing(oracle.schedule, 1), Noise([1, 2, 3]))
    due = oracle.flow(Noise([1, 2, 3])((2,), [0, 0, 0]).double(), one, 0 * one)
    torch.testing.assert_close(x.double(), due, rtol=1e-5, atol=1e-5)


def test_the_data_is_not_looked_at(gaussian):
    oracle, t = gaussian(Flow()), torch.full((2,), 0.5, dtype=F64)
    eps = torch.ones(2, 2, dtype=F64)
    assert torch.equal(Reflow(oracle)(oracle, 0 * eps, t, eps), Reflow(oracle)(oracle, 9 * eps, t, eps))


def test_no_steps_are_refused(gaussian):
    with pytest.raises(UsageError, match="at least 1"):
        Reflow(gaussian(Flow()), steps=0)
