"""The oracles against numerical integration, automatic differentiation, each other, and a fine ODE solution."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from reverie.base.errors import UsageError
from reverie.diffusion.oracles import Gaussian, Mixture
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Flow, Table, table

F64 = torch.float64


def line(schedule, point_mass=False):
    """A mixture of three in one dimension."""
    stds = torch.tensor([0.3, 0.0 if point_mass else 0.1, 0.5], dtype=F64)
    means = torch.tensor([[-1.0], [0.4], [1.5]], dtype=F64)
    return Mixture(means, stds, torch.tensor([1.0, 2.0, 1.0], dtype=F64), schedule)


def normal_density(x, mean, std):
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("level", [-6.0, 0.0, 5.0])
def test_posterior_moments_by_numerical_integration(schedule, level):
    """E and Var of x_0 given x_t from the density of the data and of the noise alone."""
    mixture = line(schedule)
    t = schedule.time(torch.full((6,), level, dtype=F64)).clamp(schedule.t_min, 1)
    alpha, sigma = (value[:1] for value in schedule.marginal(t))
    x = alpha * torch.linspace(-2, 2.5, 6, dtype=F64) + 0.3 * sigma
    lattice = torch.linspace(-5, 5, 8001, dtype=F64)
    data = sum(
        w * normal_density(lattice, m, s)
        for w, m, s in zip(mixture.weights, mixture.means[:, 0], mixture.stds[:, 0], strict=True)
    )
    weight = data * torch.exp(-0.5 * ((x[:, None] - alpha * lattice) / sigma) ** 2)
    step = lattice[1] - lattice[0]
    total = weight.sum(1)
    mean = (weight * lattice).sum(1) / total
    variance = (weight * (lattice - mean[:, None]) ** 2).sum(1) / total
    estimate = mixture(x[:, None], t)
    torch.testing.assert_close(estimate.x0[:, 0], mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(estimate.eps[:, 0], (x - alpha * mean) / sigma, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixture.variance(x[:, None], t)[:, 0], variance, rtol=1e-5, atol=1e-8)
    density = total * step / (sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(mixture.log_prob(x[:, None], t), density.log(), rtol=1e-6, atol=1e-6)


def test_the_score_is_the_gradient_of_log_prob_and_tweedie_holds(schedule, mixture, gaussian, times):
    """score = grad ln p_t; E[x_0 | x] = (x + sigma^2 score) / alpha; E[eps | x] = -sigma score."""
    t = times(schedule, 20, 0.99)
    x = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * (1 + schedule.sigma(t))[:, None]
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    for oracle in (mixture(schedule), gaussian(schedule)):
        leaf = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(oracle.log_prob(leaf, t).sum(), leaf)
        estimate = oracle(x, t)
        torch.testing.assert_close(estimate.eps, -sigma * score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alpha * estimate.x0, x + sigma**2 * score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x, rtol=1e-9, atol=1e-9)
        if isinstance(oracle, Mixture):
            torch.testing.assert_close(oracle.score(x, t), score, rtol=1e-9, atol=1e-9)


def test_the_posterior_variance_is_the_slope_of_the_estimate(schedule, mixture, times):
    """Cov[x_0 | x] = sigma^2 / alpha dE[x_0 | x] / dx, a second-order Tweedie identity."""
    oracle, t = mixture(schedule), times(schedule, 8, 0.99)
    x = diffuse(schedule, oracle.draw(8, seed=1), t, torch.randn(8, 2, dtype=F64)).requires_grad_()
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    x0 = oracle(x, t).x0
    slope = torch.stack([torch.autograd.grad(x0[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)], 1)
    torch.testing.assert_close(oracle.variance(x, t), sigma**2 / alpha * slope, rtol=1e-6, atol=1e-9)


def test_data_of_any_shape(schedule):
    """An image-shaped mixture is the flat one, pixel by pixel."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, 2, 5, dtype=F64, generator=random)
    stds = torch.rand(4, 3, 2, 5, dtype=F64, generator=random)
    weights = torch.rand(4, dtype=F64, generator=random)
    image = Mixture(means, stds, weights, schedule)
    flat = Mixture(means.flatten(1), stds.flatten(1), weights, schedule)
    x, t = torch.randn(6, 3, 2, 5, dtype=F64, generator=random), torch.linspace(0.1, 1, 6, dtype=F64)
    for got, want in zip(image(x, t)[:2], flat(x.flatten(1), t)[:2], strict=True):
        assert got.shape == x.shape
        torch.testing.assert_close(got.flatten(1), want, rtol=0, atol=0)
    assert image.score(x, t).shape == image.variance(x, t).shape == x.shape
    assert image.log_prob(x, t).shape == (6,)
    assert image.draw(7).shape == (7, 3, 2, 5)
    single = Gaussian(means[0], torch.diag(stds[0].flatten() ** 2), schedule)
    assert single(x, t).x0.shape == x.shape
    assert single.draw(7).shape == (7, 3, 2, 5)
    assert single.flow(x, t, t / 2).shape == x.shape


def test_a_round_component_may_be_given_one_std():
    means = torch.randn(3, 2, 2, dtype=F64)
    one = Mixture(means, torch.tensor([0.1, 0.2, 0.3], dtype=F64), torch.ones(3, dtype=F64), Flow())
    each = torch.tensor([0.1, 0.2, 0.3], dtype=F64).reshape(3, 1, 1).expand_as(means)
    same = Mixture(means, each, torch.ones(3, dtype=F64), Flow())
    x, t = torch.randn(5, 2, 2, dtype=F64), torch.full((5,), 0.3, dtype=F64)
    torch.testing.assert_close(one(x, t).x0, same(x, t).x0)


def test_a_gaussian_is_a_mixture_of_one(schedule):
    """With its axes turned: the mixture has the covariance's eigenvalues, in the eigenbasis."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    values, basis = torch.linalg.eigh(covariance)
    mean = torch.tensor([0.3, -0.2], dtype=F64)
    full = Gaussian(mean, covariance, schedule)
    straight = Mixture((mean @ basis)[None], values.sqrt()[None], torch.ones(1, dtype=F64), schedule)
    x, t = torch.randn(9, 2, dtype=F64), torch.linspace(schedule.t_min, 1, 9, dtype=F64)
    torch.testing.assert_close(full(x, t).x0, straight(x @ basis, t).x0 @ basis.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(full(x, t).eps, straight(x @ basis, t).eps @ basis.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(full.log_prob(x, t), straight.log_prob(x @ basis, t), rtol=1e-10, atol=1e-10)
    inverse = torch.linalg.inv(covariance)
    want = -0.5 * ((x - mean) @ inverse * (x - mean)).sum(1) - 0.5 * torch.logdet(2 * torch.pi * covariance)
    torch.testing.assert_close(full.log_prob(x), want)


def test_the_flow_map_solves_the_probability_flow_ode(schedule, gaussian):
    """Against Runge-Kutta steps of dx/dt = f x - g^2 score / 2, score = -eps / sigma."""
    oracle = gaussian(schedule)

    def slope(x, t):
        t = t.expand(len(x))
        f, g, sigma = (value[:, None] for value in (schedule.drift(t), schedule.diffusion(t), schedule.sigma(t)))
        return f * x + g**2 / (2 * sigma) * oracle(x, t).eps

    first, last = 0.75, 0.9
    if isinstance(schedule, Table):  # between two entries, where its slope does not jump
        first, last = 0.5 + 0.01 / schedule.timesteps, 0.5 + 0.99 / schedule.timesteps
    knots = torch.linspace(last, first, 13, dtype=F64)
    start = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * (1 + schedule.sigma(knots[:1]))
    x = start
    for t, s in pairwise(knots):
        h = s - t
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, s))
    exact = oracle.flow(start, knots[:1].expand(5), knots[-1:].expand(5))
    torch.testing.assert_close(x - start, exact - start, rtol=1e-5, atol=1e-5 * (exact - start).norm().item())


def test_the_flow_map_goes_there_and_back_and_ends_at_the_data(schedule, gaussian):
    oracle = gaussian(schedule)
    x = torch.randn(5, 2, dtype=F64)
    t, zero = torch.full((5,), 0.9, dtype=F64), torch.zeros(5, dtype=F64)
    torch.testing.assert_close(oracle.flow(oracle.flow(x, t, zero), zero, t), x)
    # The map carries the Gaussian of t onto that of the data: densities change by the map's Jacobian alone.
    jacobian = torch.func.jacrev(lambda v: oracle.flow(v[None], t[:1], zero[:1])[0])(x[0])
    change = oracle.log_prob(oracle.flow(x, t, zero)) - oracle.log_prob(x, t)
    torch.testing.assert_close(change, -torch.linalg.slogdet(jacobian)[1].expand(5))


def test_draws_have_the_mixtures_distribution(mixture):
    """20,000 draws, false alarms 1e-5: mode weights by chi-square, each mode's moments by z."""
    oracle, count = mixture(Flow()), 20_000
    x = oracle.draw(count)
    nearest = (x[:, None] - oracle.means).norm(dim=2).argmin(1)
    observed = torch.bincount(nearest, minlength=3)
    assert stats.chisquare(observed.numpy(), (oracle.weights * count).numpy()).pvalue > 1e-5
    bound = stats.norm.isf(0.5e-5)
    for k in range(3):
        z = (x[nearest == k] - oracle.means[k]) / oracle.stds[k]
        assert bool((z.mean(0).abs() < bound / math.sqrt(len(z))).all())
        assert bool((z.square().mean(0) - 1).abs().max() < bound * math.sqrt(2 / len(z)))
    assert torch.equal(x, oracle.draw(count))
    assert not torch.equal(x, oracle.draw(count, seed=1))


def test_draws_of_a_gaussian_have_its_covariance(gaussian):
    x = gaussian(Flow()).draw(50_000)
    torch.testing.assert_close(x.mT.cov(), torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64), rtol=0.05, atol=0.02)
    assert bool((x.mean(0) - torch.tensor([0.3, -0.2])).abs().max() < 4.5 * math.sqrt(0.5 / 50_000))


def test_weights_of_single_precision_can_be_drawn_from():
    """Their sum is 1 to 1e-7 only, which is not enough for the generator."""
    for seed in range(20):
        weights = torch.rand(7, generator=torch.Generator().manual_seed(seed)) + 0.01
        assert Mixture(torch.zeros(7, 2), torch.ones(7), weights, Flow()).draw(3).dtype == torch.float32


def test_a_point_mass_is_found_exactly(schedule):
    point = Mixture(torch.tensor([[0.3, -0.7]], dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1).double(), schedule)
    t = torch.tensor([schedule.t_min, 0.5, 1.0], dtype=F64)
    x = torch.randn(3, 2, dtype=F64)
    assert torch.equal(point(x, t).x0, point.means.expand(3, 2))
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    torch.testing.assert_close(point(x, t).eps, (x - alpha * point.means) / sigma, rtol=1e-10, atol=1e-10)


def test_without_signal_the_estimate_is_the_mean():
    schedule = table("linear", zero_snr=True)
    mixture = line(schedule, point_mass=True)
    x = torch.randn(4, 1, dtype=F64)
    estimate = mixture(x, torch.ones(4, dtype=F64))
    torch.testing.assert_close(estimate.x0, torch.full((4, 1), 0.325, dtype=F64))
    torch.testing.assert_close(estimate.eps, x)


@pytest.mark.parametrize(
    ("means", "stds", "weights", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 2), torch.ones(2), r"stds \(2, 2\)"),
        (torch.zeros(2, 3), torch.ones(2), torch.tensor([1.0, -0.5]), "-0.5"),
        (torch.zeros(2, 3), torch.tensor([1.0, -2.0]), torch.ones(2), "-2"),
    ],
)
def test_what_is_no_mixture_is_refused(means, stds, weights, message):
    with pytest.raises(UsageError, match=message):
        Mixture(means, stds, weights, Flow())


def test_a_covariance_of_the_wrong_size_is_refused():
    with pytest.raises(UsageError, match=r"a mean of 3 elements .* not \(2, 2\)"):
        Gaussian(torch.zeros(3), torch.eye(2), Flow())


def test_a_condition_is_refused_not_ignored(mixture, gaussian):
    for oracle in (mixture(Flow()), gaussian(Flow())):
        with pytest.raises(UsageError, match="label"):
            oracle(torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64), {"label": torch.zeros(1)})
