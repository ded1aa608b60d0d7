"""Autoguidance and guidance within an interval: on Gaussians and mixtures, where the answer is known."""

import math
from itertools import pairwise

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.guidance.auto import AutoGuided
from reverie.diffusion.guidance.classifier_free import ClassifierFree, Conditioned
from reverie.diffusion.guidance.interval import Interval
from reverie.diffusion.oracles import Mixture, random_mixture
from reverie.diffusion.samplers.base import run
from reverie.diffusion.samplers.runge_kutta import Heun
from reverie.diffusion.schedules import EDM, VE, Cosine, Flow

F64 = torch.float64
LOW, HIGH = 0.01, 10.0
X = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def ball(std: float) -> Mixture:
    return Mixture(torch.zeros(1, 2, dtype=F64), torch.tensor([std], dtype=F64), torch.ones(1, dtype=F64), EDM())


def levels(*bounds: float, steps: int = 200) -> list[float]:
    """Return noise levels from the first bound to the last, each of them among these."""
    found = [bounds[0]]
    for a, b in pairwise(bounds):
        found += [a * (b / a) ** (k / steps) for k in range(1, steps + 1)]
    return found


def walked(denoiser: Denoiser, x: torch.Tensor, *bounds: float) -> torch.Tensor:
    """Return where the probability flow takes x along noise levels, by Heun in many steps."""
    grid, sampler = torch.tensor(levels(*bounds), dtype=F64) / 80, Heun()
    *_, state = run(sampler, denoiser, sampler.init(x, grid[0]), grid, Noise(range(len(x))))
    return state.x


def shrinkage(std: float, high: float, low: float) -> float:
    """Return what the flow of a Gaussian multiplies x by, from one noise level to another."""
    return math.sqrt((std**2 + low**2) / (std**2 + high**2))


# Autoguidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), VE(), Flow(), Cosine()])
@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_it_is_the_papers_formula(schedule, w):
    good, bad = random_mixture(2, 0, schedule), random_mixture(2, 1, schedule)
    t = torch.tensor([schedule.t_min, 0.3, 0.6, 0.9], dtype=F64)
    found, a, b = AutoGuided(good, bad, w)(X, t), good(X, t), bad(X, t)
    torch.testing.assert_close(found.x0, b.x0 + w * (a.x0 - b.x0), rtol=1e-12, atol=1e-12)
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, X, rtol=1e-9, atol=1e-9)


def test_each_sample_may_have_its_own_guidance():
    good, bad, t = ball(0.5), ball(1.0), torch.full((4,), 0.01, dtype=F64)
    w = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = AutoGuided(good, bad, w)(X, t).x0
    for i in range(4):
        assert torch.allclose(found[i], AutoGuided(good, bad, float(w[i]))(X, t).x0[i], rtol=1e-13)


@pytest.mark.parametrize("w", [0.5, 1.0, 2.0, 3.0])
def test_the_guided_flow_of_gaussians_is_the_product_of_their_powers(w):
    """D_w is linear, so ln x moves by w of the one's flow and 1 - w of the other's: a worse model that is wider makes
    the samples narrower than the data."""
    narrow, wide = 0.5, 0.8
    want = shrinkage(narrow, HIGH, LOW) ** w * shrinkage(wide, HIGH, LOW) ** (1 - w)
    found = walked(AutoGuided(ball(narrow), ball(wide), w), HIGH * X, HIGH, LOW)
    torch.testing.assert_close(found, want * HIGH * X, rtol=1e-3, atol=0)
    if w > 1:
        assert want < shrinkage(narrow, HIGH, LOW)


def test_without_guidance_the_worse_one_is_not_asked():
    class Never(Denoiser):
        schedule = EDM()

        def forward(self, x, t, condition=None):
            raise AssertionError

    good = ball(0.5)
    t = torch.full((4,), 0.01, dtype=F64)
    assert torch.equal(AutoGuided(good, Never(), 1.0)(X, t).x0, good(X, t).x0)


def test_the_condition_goes_to_both():
    class Told(Denoiser):
        schedule = EDM()

        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, t, condition=None):
            return Estimate(self.factor * condition["label"][:, None] * x, x)

    found = AutoGuided(Told(2.0), Told(1.0), 3.0)(X, torch.full((4,), 0.1, dtype=F64), {"label": torch.arange(4.0)})
    torch.testing.assert_close(found.x0, 4 * torch.arange(4.0)[:, None] * X)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="finite number"):
        AutoGuided(ball(1), ball(2), math.inf)
    with pytest.raises(UsageError, match="different schedules"):
        AutoGuided(ball(1), random_mixture(2, 0, Flow()), 2.0)
    with pytest.raises(UsageError, match="3 numbers for 4 samples"):
        AutoGuided(ball(1), ball(2), torch.ones(3))(X, torch.full((4,), 0.1, dtype=F64))


# The interval --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), VE(), Flow(), Cosine()])
def test_which_denoiser_answers(schedule):
    """Bounds are noise levels sigma / alpha, whatever the schedule; each sample has its own time."""
    guided, plain = random_mixture(2, 0, schedule), random_mixture(2, 1, schedule)
    t = schedule.time(-2 * torch.tensor([0.1, 0.29, 0.31, 1.99], dtype=F64).log())
    found = Interval(guided, plain, 0.3, 2.0)(X, t)
    for i, inside in enumerate((False, False, True, True)):
        assert torch.equal(found.x0[i], (guided if inside else plain)(X, t).x0[i])
        assert torch.equal(found.eps[i], (guided if inside else plain)(X, t).eps[i])
    beyond = schedule.time(-2 * torch.tensor([2.01], dtype=F64).log())
    assert torch.equal(Interval(guided, plain, 0.3, 2.0)(X[:1], beyond).x0, plain(X[:1], beyond).x0)


def test_at_the_end_of_time_without_signal():
    guided, plain, t = random_mixture(2, 0, Flow()), random_mixture(2, 1, Flow()), torch.ones(4, dtype=F64)
    assert torch.equal(Interval(guided, plain, 0.3, 2.0)(X, t).x0, plain(X, t).x0)
    assert torch.equal(Interval(guided, plain)(X, t).x0, guided(X, t).x0)


def test_no_bounds_is_guidance_everywhere():
    guided, plain = ball(0.5), ball(1.0)
    t = torch.tensor([1e-5, 0.01, 0.5, 1.0], dtype=F64)
    assert torch.equal(Interval(guided, plain)(X, t).x0, guided(X, t).x0)


def test_outside_of_it_guidance_costs_nothing():
    class Never(Denoiser):
        schedule = EDM()

        def forward(self, x, t, condition=None):
            raise AssertionError

    t = torch.full((4,), 0.5, dtype=F64)  # noise level 40
    assert torch.equal(Interval(Never(), ball(1), 0.3, 2.0)(X, t).x0, ball(1)(X, t).x0)


def test_the_flow_with_an_interval_is_that_of_three_stretches():
    narrow, wide, w, low, high = 0.5, 0.8, 3.0, 0.2, 2.0
    denoiser = Interval(AutoGuided(ball(narrow), ball(wide), w), ball(narrow), low, high)
    within = shrinkage(narrow, high, low) ** w * shrinkage(wide, high, low) ** (1 - w)
    want = shrinkage(narrow, HIGH, high) * within * shrinkage(narrow, low, LOW)
    found = walked(denoiser, HIGH * X, HIGH, high, low, LOW)
    torch.testing.assert_close(found, want * HIGH * X, rtol=5e-3, atol=0)
    everywhere = shrinkage(narrow, HIGH, LOW) ** w * shrinkage(wide, HIGH, LOW) ** (1 - w)
    assert abs(want / everywhere - 1) > 0.02


def test_classifier_free_guidance_takes_an_interval_too():
    class Parts(Denoiser):
        """Two balls by label, their mixture for label 2: each exact."""

        def __init__(self):
            super().__init__()
            self.schedule = EDM()
            means, stds = torch.tensor([[-1.0, 0], [1.0, 0]], dtype=F64), torch.tensor([0.3, 0.3], dtype=F64)
            ones = torch.ones(2, dtype=F64)
            self.parts = [Mixture(means[k : k + 1], stds[:1], ones[:1], self.schedule) for k in range(2)]
            self.parts.append(Mixture(means, stds, ones, self.schedule))

        def forward(self, x, t, condition=None):
            rows = [self.parts[k](x[i : i + 1], t[i : i + 1]) for i, k in enumerate(condition["label"].tolist())]
            return Estimate(torch.cat([row.x0 for row in rows]), torch.cat([row.eps for row in rows]))

    model, asked, none = Parts(), {"label": torch.tensor([0, 1, 0, 1])}, {"label": torch.full((4,), 2)}
    denoiser = Interval(ClassifierFree(model, asked, none, 3.0), Conditioned(model, asked), 0.5, 5.0)
    t = torch.tensor([0.1, 1.0, 4.0, 20.0], dtype=F64) / 80
    c, u, found = model(X, t, asked).x0, model(X, t, none).x0, denoiser(X, t).x0
    torch.testing.assert_close(found[1:3], (u + 3 * (c - u))[1:3])
    assert torch.equal(found[[0, 3]], c[[0, 3]])
    with pytest.raises(UsageError, match="bound already"):
        denoiser(X, t, asked)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (-0.1, 1.0), (2.0, 1.0), (0.0, math.nan)])
def test_bounds_that_are_none_are_refused(low, high):
    with pytest.raises(UsageError, match="0 <= low < high"):
        Interval(ball(1), ball(2), low, high)
