"""Guidance by several differences at once, from one estimate; rescaled; away from a broken network; during a time."""

import math
from contextlib import contextmanager

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.guidance.auto import AutoGuided
from reverie.diffusion.guidance.classifier_free import ClassifierFree, Conditioned
from reverie.diffusion.guidance.interval import During, Interval
from reverie.diffusion.guidance.perturbed import Perturbed, PerturbedGuided
from reverie.diffusion.guidance.rescale import Rescaled
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.schedules import Flow, table

F64 = torch.float64
X = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
ASKED, NOTHING = {"label": torch.ones(3, dtype=torch.int64)}, {"label": torch.zeros(3, dtype=torch.int64)}


class Labelled(Denoiser):
    """One mixture for each label, and another that it is within a context; it counts its rows."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.rows, self.broken = schedule, 0, False
        self.parts = [random_mixture(6, seed, schedule) for seed in range(3)]

    def forward(self, x, t, condition=None):
        self.rows += len(x)
        labels = [2] * len(x) if self.broken else condition["label"].tolist()
        found = [self.parts[label](x[i : i + 1], t[i : i + 1]) for i, label in enumerate(labels)]
        return Estimate(torch.cat([one.x0 for one in found]), torch.cat([one.eps for one in found]))

    @contextmanager
    def breaking(self):
        self.broken = True
        try:
            yield
        finally:
            self.broken = False


def kinds(model):
    """Return the guided denoisers that can be put around each other."""
    asked, free = Conditioned(model, ASKED), ClassifierFree(model, ASKED, NOTHING, 3.0)
    perturbed = Perturbed(asked, model.breaking)
    return {
        "classifier-free": free,
        "auto": AutoGuided(asked, model.parts[2], 2.0),
        "perturbed": PerturbedGuided(asked, perturbed, 2.0),
        "both": PerturbedGuided(free, perturbed, 2.0),
    }


# Perturbed -----------------------------------------------------------------------------------------


def test_it_is_the_papers_formula_and_the_context_is_left():
    model = Labelled(table("linear"))
    found = kinds(model)["perturbed"](X, T)
    asked, broken = model.parts[1](X, T), model.parts[2](X, T)
    for field in ("x0", "eps"):
        good, bad = getattr(asked, field), getattr(broken, field)
        torch.testing.assert_close(getattr(found, field), good + 2 * (good - bad), rtol=1e-12, atol=1e-12)
    assert not model.broken


def test_beside_classifier_free_guidance_both_differences_are_taken_from_one_estimate():
    model = Labelled(table("linear"))
    found = kinds(model)["both"](X, T).x0
    assert model.rows == 9
    none, asked, broken = (part(X, T).x0 for part in model.parts)
    torch.testing.assert_close(found, none + 3 * (asked - none) + 2 * (asked - broken), rtol=1e-12, atol=1e-12)


def test_at_scale_zero_the_perturbed_one_is_not_asked():
    model = Labelled(Flow())
    asked = Conditioned(model, ASKED)
    found = PerturbedGuided(asked, Perturbed(asked, model.breaking), 0.0)(X, T)
    assert model.rows == 3
    assert torch.equal(found.x0, asked(X, T).x0)


# Rescaled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classifier-free", "auto", "perturbed", "both"])
def test_phi_zero_is_no_change_and_phi_one_the_spread_without_guidance(kind):
    schedule = table("linear")
    guided, asked = kinds(Labelled(schedule))[kind], random_mixture(6, 1, schedule)(X, T)
    plain = guided(X, T)
    none, whole, half = (Rescaled(guided, phi)(X, T) for phi in (0.0, 1.0, 0.5))
    assert torch.equal(none.x0, plain.x0)
    assert torch.equal(none.eps, plain.eps)
    torch.testing.assert_close(whole.x0.std(1), asked.x0.std(1), rtol=1e-12, atol=0)
    assert ((plain.x0.std(1) / asked.x0.std(1)).log().abs() > 1e-3).all()
    torch.testing.assert_close(half.x0, (plain.x0 + whole.x0) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.x0 / plain.x0, (whole.x0[:, :1] / plain.x0[:, :1]).expand(3, 6))
    alpha, sigma = (value[:, None] for value in schedule.marginal(T))
    torch.testing.assert_close(alpha * whole.x0 + sigma * whole.eps, X, rtol=1e-9, atol=1e-9)


def test_a_flat_estimate_is_not_divided_by():
    class Flat(Denoiser):
        schedule = Flow()

        def forward(self, x, t, condition=None):
            return Estimate(torch.ones_like(x), x)

    assert torch.equal(Rescaled(Flat(), 1.0)(X, T).x0, torch.ones_like(X))


def test_rescaling_asks_for_nothing_twice():
    model = Labelled(Flow())
    Rescaled(kinds(model)["both"], 0.7)(X, T)
    assert model.rows == 9


# During --------------------------------------------------------------------------------------------


def test_during_a_stretch_of_time_bounds_as_they_are_written():
    """low < t <= high to the last bit, where an interval of noise levels would have to round."""
    schedule = Flow()
    guided, plain = random_mixture(2, 0, schedule), random_mixture(2, 1, schedule)
    t = torch.tensor([0.1, 0.2, math.nextafter(0.2, 1), 0.8, math.nextafter(0.8, 1), 1.0], dtype=F64)
    x = torch.ones(6, 2, dtype=F64)
    found = During(guided, plain, 0.2, 0.8)(x, t)
    for i, inside in enumerate((False, False, True, True, False, False)):
        assert torch.equal(found.x0[i], (guided if inside else plain)(x, t).x0[i])
    assert torch.equal(During(guided, plain, 0.2, 1.0)(x, t).x0[5], guided(x, t).x0[5])
    levels = Interval(guided, plain, 0.25, 4.0)  # the same stretch: sigma / alpha is t / (1 - t)
    within = torch.tensor([0.15, 0.3, 0.5, 0.7, 0.9, 0.95], dtype=F64)
    assert torch.equal(levels(x, within).x0, During(guided, plain, 0.2, 0.8)(x, within).x0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Rescaled(m, -0.1), "guidance_rescale is -0.1"),
        (lambda m: Rescaled(m, math.nan), "guidance_rescale is nan"),
        (lambda m: PerturbedGuided(m, m, math.inf), "scale is inf"),
        (lambda m: During(m, m, 0.8, 0.2), "0 <= low < high"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(Labelled(Flow()))
