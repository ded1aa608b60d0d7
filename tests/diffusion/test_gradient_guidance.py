"""Guidance along a gradient: by a classifier, by a similarity, by any score; each where the answer is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.guidance.classifier import ClassifierGuided
from reverie.diffusion.guidance.gradient import Steered
from reverie.diffusion.guidance.similarity import SimilarityGuided
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.registry import grids
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.schedules import EDM, Flow, table

F64 = torch.float64
X = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 2, 1])


def near(schedule):
    """Return components close enough to each other that which one a point is of is in doubt, but no two alike."""
    means = torch.tensor([[-0.5, 0.5], [0.5, -0.5], [0.3, 1.0]], dtype=F64)
    stds = torch.tensor([[0.5, 0.4], [0.4, 0.6], [0.3, 0.3]], dtype=F64)
    return Mixture(means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=F64), schedule)


def component(mixture, k):
    """Return the exact denoiser of one component."""
    return Mixture(mixture.means[k][None], mixture.stds[k][None], torch.ones(1, dtype=F64), mixture.schedule)


def knows(mixture):
    """Return the exact classifier: ln p(component | x_t), and a constant."""
    return lambda x, t: mixture.parts(x, t).joint


def makes_up(estimate, x, t, schedule):
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x, rtol=1e-9, atol=1e-9)


# A classifier --------------------------------------------------------------------------------------


def test_at_scale_one_it_is_the_conditional_denoiser_exactly(schedule):
    """Bayes: grad ln p_t(x) + grad ln p(y | x_t) is the score of the component's own density."""
    mixture, t = near(schedule), torch.tensor([max(schedule.t_min, 0.05), 0.5, 0.95], dtype=F64)
    found = ClassifierGuided(mixture, knows(mixture), LABEL)(X, t)
    for i, k in enumerate(LABEL.tolist()):
        want = component(mixture, k)(X[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found.x0[i : i + 1], want.x0, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.eps[i : i + 1], want.eps, rtol=1e-8, atol=1e-8)
    unguided = mixture(X, t)
    assert (found.eps - unguided.eps).abs().max() > 1e-2
    makes_up(found, X, t, schedule)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.0])
def test_at_other_scales_it_is_the_score_of_the_tilted_density(scale):
    mixture, t = near(table("linear")), torch.tensor([0.1, 0.4, 0.9], dtype=F64)
    leaf = X.clone().requires_grad_()
    log = mixture.parts(leaf, t).joint.log_softmax(1)[torch.arange(3), LABEL]
    (slope,) = torch.autograd.grad((mixture.log_prob(leaf, t) + scale * log).sum(), leaf)
    found = ClassifierGuided(mixture, knows(mixture), LABEL, scale)(X, t)
    torch.testing.assert_close(found.eps, -mixture.schedule.sigma(t)[:, None] * slope, rtol=1e-9, atol=1e-9)
    makes_up(found, X, t, mixture.schedule)


def test_a_classifier_of_clean_data_sees_the_estimate_and_its_gradient_goes_through_the_denoiser():
    mixture, t = near(Flow()), torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    weight = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = ClassifierGuided(mixture, lambda x, t: x @ weight.mT, LABEL, 2.0, clean=True)(X, t)
    rows = []
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x, i=i: mixture(x[None], t[i : i + 1]).x0[0], X[i])
        probability = (weight @ mixture(X, t).x0[i]).softmax(0)
        rows.append(jacobian.mT @ (weight[LABEL[i]] - probability @ weight))
    alpha, sigma = (value[:, None] for value in mixture.schedule.marginal(t))
    torch.testing.assert_close(found.x0, mixture(X, t).x0 + 2 * sigma**2 / alpha * torch.stack(rows))
    makes_up(found, X, t, mixture.schedule)


def test_each_sample_may_have_its_own_scale():
    mixture, t = near(Flow()), torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    scales = torch.tensor([0.0, 1.0, 3.0])
    found = ClassifierGuided(mixture, knows(mixture), LABEL, scales)(X, t).x0
    for i in range(3):
        one = slice(i, i + 1)
        alone = ClassifierGuided(mixture, knows(mixture), LABEL[one], float(scales[i]))(X[one], t[one])
        torch.testing.assert_close(found[one], alone.x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0], mixture(X, t).x0[0])


def test_a_sampler_draws_the_class_that_was_asked_for():
    """Samplers run without gradients, and guidance makes its own: every sample ends in its component, to the 5 standard
    deviations that none of 200 points leaves in a million tries (1e-4), and in the mixture's own draws half do not."""
    mixture = Mixture(
        torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64), torch.full((2,), 0.1, dtype=F64), torch.ones(2, dtype=F64),
        Flow(),
    )  # fmt: skip
    label = torch.ones(200, dtype=torch.int64)
    guided = ClassifierGuided(mixture, knows(mixture), label)
    grid = grids["trailing"](mixture.schedule, 100)
    with torch.inference_mode():
        drawn = sample(DDIM(), guided, (2,), grid, Noise(range(200)))
    assert not drawn.requires_grad
    assert ((drawn[:, 0] - 1).abs() < 0.5).all()
    plain = sample(DDIM(), mixture, (2,), grid, Noise(range(200)))
    assert 50 < (plain[:, 0] > 0).sum() < 150


# A similarity, and any score -----------------------------------------------------------------------


def test_a_linear_score_moves_a_gaussians_mean_by_s_times_its_variance_times_the_slope(schedule):
    """N(m, S) tilted by exp(s v . x) is N(m + s S v, S): so the posterior mean moves by s V v, V the posterior's
    variance alone; and through the estimate that is exact, as the denoiser of a Gaussian is linear."""
    std = torch.tensor([[0.5, 1.5]], dtype=F64)
    ball = Mixture(torch.tensor([[0.3, -0.2]], dtype=F64), std, torch.ones(1, dtype=F64), schedule)
    slope, s = torch.tensor([2.0, -1.0], dtype=F64), 1.7
    t = torch.tensor([max(schedule.t_min, 0.05), 0.5, 0.95], dtype=F64)
    found = Steered(ball, lambda x0, t: x0 @ slope, s, clean=True)(X, t)
    want = ball(X, t).x0 + s * ball.variance(X, t) * slope
    torch.testing.assert_close(found.x0, want, rtol=1e-8, atol=1e-8)
    tilted = Mixture(ball.means + s * std**2 * slope, std, torch.ones(1, dtype=F64), schedule)
    torch.testing.assert_close(found.eps, tilted(X, t).eps, rtol=1e-8, atol=1e-8)
    makes_up(found, X, t, schedule)


@pytest.mark.parametrize("clean", [True, False])
def test_a_similarity_is_the_cosine_and_its_gradient_autograds(clean):
    mixture, t = near(table("linear")), torch.tensor([0.1, 0.4, 0.9], dtype=F64)
    matrix, text = (torch.randn(n, 4, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    guided = SimilarityGuided(mixture, lambda x, t: (x @ matrix).tanh(), 7 * text, 3.0, clean)
    leaf = X.clone().requires_grad_()
    seen = mixture(leaf, t).x0 if clean else leaf
    values = F.cosine_similarity((seen @ matrix).tanh(), text)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    estimate = guided(X, t)
    torch.testing.assert_close(
        estimate.eps, mixture(X, t).eps - 3 * mixture.schedule.sigma(t)[:, None] * slope, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(guided.similarity(seen, t), values)
    makes_up(estimate, X, t, mixture.schedule)


def test_one_text_may_do_for_all():
    mixture, t, text = near(Flow()), torch.full((3,), 0.5, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    one = SimilarityGuided(mixture, lambda x, t: x, text)(X, t)
    each = SimilarityGuided(mixture, lambda x, t: x, text.expand(3, 2))(X, t)
    assert torch.equal(one.x0, each.x0)


# What both have in common ---------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False])
def test_at_zero_signal_the_estimate_stays_as_it_is(clean):
    """There alpha is 0: x says nothing of x_0, and a sampler's first step must not divide by it."""
    mixture, t = near(Flow()), torch.ones(3, dtype=F64)
    found = ClassifierGuided(mixture, lambda x, t: x, LABEL.clamp(max=1), 2.0, clean)(X, t)
    assert torch.equal(found.x0, mixture(X, t).x0)
    assert torch.equal(found.eps, mixture(X, t).eps)


def test_without_a_scale_nothing_is_asked():
    def never(x, t):
        raise AssertionError

    mixture, t = near(EDM()), torch.full((3,), 0.01, dtype=F64)
    assert torch.equal(Steered(mixture, never, 0.0)(X, t).x0, mixture(X, t).x0)


def test_condition_and_learned_variance_pass_through_and_no_gradient_leaves():
    class Told(Denoiser):
        schedule = Flow()

        def forward(self, x, t, condition=None):
            return Estimate(condition["label"][:, None] * x, x, 0.5 * x)

    told, t = {"label": torch.ones(3, dtype=F64)}, torch.full((3,), 0.5, dtype=F64)
    for clean in (True, False):
        found = Steered(Told(), lambda x, t: x.sum(1), 1.0, clean)(X, t, told)
        assert torch.equal(found.fraction, 0.5 * X)
        assert not any(part.requires_grad for part in found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Steered(m, lambda x, t: x.sum(1), math.inf), "scale is inf"),
        (lambda m: Steered(m, lambda x, t: x.sum(1), torch.ones(2)), "2 numbers for 3 samples"),
        (lambda m: Steered(m, lambda x, t: x.sum()), "one number for each is due"),
        (lambda m: Steered(m, lambda x, t: x.detach().sum(1)), "must be differentiable"),
        (lambda m: ClassifierGuided(m, knows(m), torch.tensor([0, 1])), "3 samples and 2 labels"),
        (lambda m: ClassifierGuided(m, knows(m), torch.tensor([0, 1, 3])), r"classifier knows 0\.\.2"),
        (lambda m: ClassifierGuided(m, lambda x, t: x[:, 0], LABEL), r"gives \(3,\)"),
        (lambda m: SimilarityGuided(m, lambda x, t: x, torch.zeros(1, 2, dtype=F64)), "none of length 0"),
        (lambda m: SimilarityGuided(m, lambda x, t: x, torch.ones(2, 2, dtype=F64)), "one for each"),
        (lambda m: SimilarityGuided(m, lambda x, t: x, torch.ones(1, 3, dtype=F64)), r"the text's \(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(near(Flow()))(X, torch.full((3,), 0.5, dtype=F64))
