"""Latent consistency: of a guided Gaussian the exact map has no loss, at every guidance."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.few_step.common import time_of_ratio
from reverie.diffusion.few_step.latent_consistency import LatentConsistency
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.schedules import EDM

F64 = torch.float64
STD = 0.5
MEANS = torch.tensor([1.0, -0.4], dtype=F64)  # of the class, and of nothing
LABEL, NOTHING = {"label": torch.zeros(6, dtype=torch.int64)}, {"label": torch.ones(1, dtype=torch.int64)}


class Conditional(Denoiser):
    """Two classes N(m, STD^2): as all have one std, guidance makes that of m_u + w (m_c - m_u)."""

    def __init__(self):
        super().__init__()
        self.schedule = EDM()

    def forward(self, x, t, condition=None):
        sigma, mean = per_sample(self.schedule.sigma(t), x), MEANS[condition["label"]][:, None]
        x0 = mean + STD**2 / (STD**2 + sigma**2) * (x - mean)
        return Estimate(x0, (x - x0) / sigma)


class Told(Conditional):
    """The exact map of the guided ODE, whose guidance it is told, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.seen = factor, []

    def forward(self, x, t, condition=None):
        w = condition["guidance"][:, None]
        self.seen.append(w)
        mean = MEANS[1] + self.factor * w * (MEANS[0] - MEANS[1])
        sigma = per_sample(self.schedule.sigma(t), x)
        x0 = mean + STD / (STD**2 + sigma**2).sqrt() * (x - mean)
        return Estimate(x0, (x - x0) / sigma)


def losses(student, last, **options):
    torch.manual_seed(0)
    t = time_of_ratio(EDM(), torch.ones(6, dtype=F64))
    objective = LatentConsistency(Conditional(), NOTHING, last=last, width=1.0, **options)
    return objective(student, torch.zeros(6, 1, dtype=F64), t, torch.linspace(-1, 1, 6, dtype=F64)[:, None], LABEL)


def test_the_exact_guided_map_has_no_loss_but_the_solvers():
    fine, coarse = losses(Told(), 400, solver="heun").max(), losses(Told(), 100, solver="heun").max()
    assert fine < 1e-8
    assert fine < coarse / 100
    assert losses(Told(1.2), 400, solver="heun").max() > 1e3 * fine


def test_both_sides_are_told_the_guidance_that_was_drawn():
    student = Told()
    losses(student, 50, low=2.0, high=5.0)
    one, other = student.seen
    assert torch.equal(one, other)
    assert bool(((one >= 2) & (one <= 5)).all())
    assert len(one.unique()) == 6


def test_what_is_refused():
    with pytest.raises(UsageError, match="low <= high"):
        LatentConsistency(Conditional(), NOTHING, low=3.0, high=2.0)
    with pytest.raises(UsageError, match="has none"):
        LatentConsistency(Conditional(), NOTHING)(Told(), *[torch.zeros(1)] * 3, {})
