"""Objectives against closed forms, by Gauss-Hermite quadrature: squared errors are polynomials, so it is exact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate, NetworkDenoiser
from reverie.diffusion.likelihood import bound
from reverie.diffusion.objectives import Hybrid, Simple, Variational, errors_by_time
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import predictions, weights
from reverie.diffusion.schedules import Flow, Table, table
from reverie.diffusion.weights import MinSNR, Uniform

F64 = torch.float64
STD = 0.6


def bell(schedule):
    """N(0.4, 0.6^2), in one dimension."""
    one = torch.ones(1, dtype=F64)
    return Mixture(0.4 * one[None], STD * one, one, schedule)


def quadrature(nodes=4):
    """Pairs of independent standard normals (N, 1) each, and their weights (N,): exact for degree 2 nodes - 1."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    a, b = np.meshgrid(z, z)
    weight = np.outer(w, w).flatten() / w.sum() ** 2
    return *(torch.from_numpy(v.flatten()[:, None]) for v in (a, b)), torch.from_numpy(weight)


def expected(objective, denoiser, t, nodes=4):
    """The expected loss at one time over data 0.4 + 0.6 a and noise b."""
    a, b, weight = quadrature(nodes)
    return (weight * objective(denoiser, 0.4 + STD * a, torch.full((len(a),), float(t), dtype=F64), b)).sum().item()


def levels(schedule):
    return [schedule.t_min, 0.1, 0.5, 0.9, 1.0] if not schedule.zero_terminal_snr else [schedule.t_min, 0.1, 0.5, 0.9]


@pytest.mark.parametrize("name", predictions)
def test_the_optimal_loss_is_its_closed_form(schedule, name):
    """Var(p x_0 + q eps | x) = (p sigma - q alpha)^2 s^2 / (alpha^2 s^2 + sigma^2), for every target."""
    target, (a, b, weight) = predictions[name](), quadrature()
    t = torch.tensor(levels(schedule), dtype=F64)
    rows = t.repeat_interleave(len(a))
    loss = Simple(name)(bell(schedule), (0.4 + STD * a).repeat(len(t), 1), rows, b.repeat(len(t), 1))
    got = (weight * loss.reshape(len(t), -1)).sum(1)
    alpha, sigma = schedule.marginal(t)
    p, q = target.blend(alpha, sigma)
    want = (p * sigma - q * alpha) ** 2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    snr = (alpha / sigma) ** 2
    known = {"eps": snr * STD**2 / (snr * STD**2 + 1), "x0": STD**2 / (snr * STD**2 + 1)}
    torch.testing.assert_close(want, known.get(name, want), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_the_optimum_is_at_the_oracle(schedule, name):
    """Any other estimate costs its squared distance from the oracle more: the loss has its least there."""
    oracle = bell(schedule)

    class Off(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x, t, condition=None):
            estimate, (alpha, sigma) = oracle(x, t), self.schedule.marginal(t)
            shift = 0.1 * torch.tanh(x)
            return Estimate(estimate.x0 + shift, estimate.eps - (alpha / sigma)[:, None] * shift)

    t = schedule.time(torch.zeros(1, dtype=F64)).item()
    objective = Simple(name)
    a, b, weight = quadrature(60)
    rows = torch.full((len(a),), t, dtype=F64)
    x = diffuse(schedule, 0.4 + STD * a, rows, b)
    there, here = Off()(x, rows), oracle(x, rows)
    alpha, sigma = schedule.marginal(rows)
    extra = predictions[name]().encode(there.x0 - here.x0, there.eps - here.eps, alpha, sigma).square()[:, 0]
    gain = expected(objective, Off(), t, 60) - expected(objective, oracle, t, 60)
    assert gain == pytest.approx((weight * extra).sum().item(), rel=1e-6)
    assert gain > 0


@pytest.mark.parametrize("name", predictions)
def test_whatever_the_network_predicts_the_loss_is_the_same(schedule, name, mixture, knowing):
    """Every prediction under every target: an oracle in a network's clothes has the oracle's losses."""
    oracle, prediction = mixture(schedule), predictions[name]()
    if schedule.zero_terminal_snr and not prediction.at_zero_signal:
        return
    network = NetworkDenoiser(knowing(oracle, prediction), schedule, prediction)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=F64)
    if isinstance(schedule, Table):
        t = schedule.time_of_timestep(schedule.timestep(t).round())
    x0, eps = oracle.draw(4), torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = diffuse(schedule, x0, t, eps)
    got, want = network(x, t), oracle(x, t)
    for objective in (*(Simple(target) for target in predictions), Simple("eps", "l1"), Simple("x0", weight="min-snr")):
        torch.testing.assert_close(
            objective.loss(network, got, x0, t, eps), objective.loss(oracle, want, x0, t, eps), rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(Simple("v")(network, x0, t, eps), Simple("v").loss(oracle, want, x0, t, eps))


def test_the_optimal_loss_of_a_mixture_is_its_mean_posterior_variance(schedule):
    oracle = Mixture(
        torch.tensor([[-1.0], [0.8]], dtype=F64),
        torch.tensor([0.3, 0.2], dtype=F64),
        torch.ones(2, dtype=F64),
        schedule,
    )
    a, b, weight = quadrature(80)
    t = schedule.time(torch.zeros(1, dtype=F64)).expand(2 * len(a))
    x0 = torch.cat([m + s * a for m, s in zip(oracle.means, oracle.stds, strict=True)])
    eps, weight = b.repeat(2, 1), weight.repeat(2) / 2
    loss = (weight * Simple("x0")(oracle, x0, t, eps)).sum()
    variance = (weight * oracle.variance(diffuse(schedule, x0, t, eps), t)[:, 0]).sum()
    torch.testing.assert_close(loss, variance, rtol=1e-4, atol=0)


def test_l1_and_huber(schedule):
    """The error of eps is Gaussian: its mean magnitude is sqrt(2 v / pi); Huber's lies between square and line."""
    oracle, t = bell(schedule), schedule.time(torch.zeros(1, dtype=F64)).item()
    v = expected(Simple("eps"), oracle, t)
    # Midpoints of 300 x 300 equal cells of probability.
    z = torch.special.ndtri((torch.arange(300, dtype=F64) + 0.5) / 300)
    a, b = (value.flatten()[:, None] for value in torch.meshgrid(z, z, indexing="ij"))
    rows = torch.full((len(a),), t, dtype=F64)

    def mean(objective):
        return objective(oracle, 0.4 + STD * a, rows, b).mean().item()

    assert mean(Simple("eps", "l1")) == pytest.approx(math.sqrt(2 * v / math.pi), rel=2e-3)
    assert mean(Simple("eps", "huber", huber_width=100.0)) == pytest.approx(mean(Simple("eps")) / 2, rel=1e-9)
    narrow = mean(Simple("eps", "huber", huber_width=1e-6)) / 1e-6
    assert narrow == pytest.approx(mean(Simple("eps", "l1")), rel=1e-5)


@pytest.mark.parametrize(("width", "want"), [(1.0, [0.125, 1.5, 0.0]), (0.5, [0.125, 0.875, 0.0])])
def test_hubers_own_numbers(width, want):
    point = Mixture(torch.zeros(1, 1, dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), Flow())
    x0 = torch.tensor([[0.5], [-2.0], [0.0]], dtype=F64)
    loss = Simple("x0", "huber", huber_width=width)(point, x0, torch.full((3,), 0.5, dtype=F64), torch.zeros_like(x0))
    assert loss.tolist() == want


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_weights_multiply_the_loss_of_their_target(schedule, target, mixture):
    oracle = mixture(schedule)
    t = schedule.time(torch.tensor([4.0, 1.0, -2.0], dtype=F64))
    x0, eps = oracle.draw(3), torch.randn(3, 2, dtype=F64)
    estimate, (alpha, sigma) = oracle(diffuse(schedule, x0, t, eps), t), schedule.marginal(t)
    plain = Simple(target).loss(oracle, estimate, x0, t, eps)
    for name in weights:
        factor = weights[name]()(predictions[target](), alpha, sigma)
        weighted = Simple(target, weight=name).loss(oracle, estimate, x0, t, eps)
        torch.testing.assert_close(weighted, factor * plain)
        assert name == "uniform" or not torch.allclose(weighted, plain)


def test_a_loss_for_each_sample_the_mean_over_its_elements(mixture):
    oracle = mixture(table("linear"))
    t, x0, eps = torch.rand(5, dtype=F64), oracle.draw(5), torch.randn(5, 2, dtype=F64)
    together = Simple("eps")(oracle, x0, t, eps)
    assert together.shape == (5,)
    estimate = oracle(diffuse(oracle.schedule, x0, t, eps), t)
    torch.testing.assert_close(together, (estimate.eps - eps).square().mean(1))
    for i in range(5):
        alone = Simple("eps")(oracle, x0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=0)


# The bound as a loss --------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("quantised", [None, 256])
def test_the_mean_of_l_vlb_over_timesteps_is_the_bounds_steps_and_decoder(variance, quantised, mixture):
    schedule = table("linear", 20, last=0.3)
    oracle, count = mixture(schedule), 6
    x0 = ((oracle.draw(count).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    noise = Noise(range(count))
    whole = bound(oracle, x0, noise, variance=variance, levels=quantised)
    terms = []
    for i in range(20):
        t = schedule.time_of_timestep(torch.full((count,), i))
        terms.append(Variational(variance, quantised)(oracle, x0, t, noise.like(x0, [i + 1] * count)))
    torch.testing.assert_close(torch.stack(terms).mean(0), whole.steps + whole.decoder, rtol=1e-10, atol=0)


class TwoHeads(nn.Module):
    """A network with one number for the mean and one for the variance."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.tensor(0.3).double()), nn.Parameter(torch.tensor(0.2).double())

    def forward(self, x, time):
        return torch.cat([self.mean * x, self.spread * torch.tanh(x)], 1)


def gradients(objective, learned=True):
    network, schedule = TwoHeads(), table("linear", 50)
    t = schedule.time_of_timestep(torch.tensor([0, 3, 20, 49]))
    x0, eps = torch.rand(2, 4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = objective(NetworkDenoiser(network, schedule, "eps", learned_variance=learned), x0, t, eps)
    return torch.autograd.grad(loss.mean(), [network.mean, network.spread], allow_unused=True)


def test_in_l_hybrid_the_mean_learns_from_l_simple_and_the_variance_from_l_vlb():
    mean, spread = gradients(Hybrid())
    simple_mean, simple_spread = gradients(Simple("eps"))
    bound_mean, bound_spread = gradients(Variational("learned"))
    torch.testing.assert_close(mean, simple_mean, rtol=1e-12, atol=0)
    assert simple_spread is None or simple_spread == 0
    torch.testing.assert_close(spread, 0.001 * bound_spread, rtol=1e-12, atol=0)
    assert bound_spread != 0
    assert bound_mean != 0  # which the hybrid leaves out


def test_l_hybrid_is_the_sum_of_its_two():
    schedule = table("linear", 50)
    denoiser = NetworkDenoiser(TwoHeads(), schedule, "eps", learned_variance=True)
    t = schedule.time_of_timestep(torch.tensor([0, 20]))
    x0, eps = torch.rand(2, 2, 3, dtype=F64)
    hybrid = Hybrid(Simple("v", weight=MinSNR()), scale=0.5, levels=None)(denoiser, x0, t, eps)
    want = Simple("v", weight="min-snr")(denoiser, x0, t, eps) + 0.5 * Variational("learned", None)(
        denoiser, x0, t, eps
    )
    torch.testing.assert_close(hybrid, want, rtol=1e-12, atol=0)


def test_the_gradient_of_the_decoder_is_finite_at_the_outermost_levels():
    schedule = table("linear", 50)
    network = TwoHeads()
    denoiser = NetworkDenoiser(network, schedule, "eps", learned_variance=True)
    x0 = torch.tensor([[-1.0, 1.0, 0.99, 1 / 255]], dtype=F64)
    loss = Variational("learned")(
        denoiser, x0, schedule.time_of_timestep(torch.tensor([0])), torch.randn(1, 4).double()
    )
    for slope in torch.autograd.grad(loss.sum(), list(network.parameters())):
        assert slope.isfinite().item()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Simple("epsilon"), "did you mean eps"),
        (lambda: Simple(weight="minsnr"), "did you mean min-snr"),
        (lambda: Simple("eps", "l3"), "distance is 'l3'"),
        (lambda: Simple("eps", "l1", "min-snr"), "with l1 it must be uniform"),
        (lambda: Simple("eps", "huber", MinSNR()), "with huber it must be uniform"),
        (lambda: Simple("eps", "huber", huber_width=0.0), "huber_width is 0.0"),
        (lambda: Simple("eps", "l2", huber_width=0.1), "no effect on l2"),
        (lambda: Variational("fixed"), "variance is 'fixed'"),
        (lambda: Variational(levels=1), "levels is 1"),
    ],
)
def test_what_has_no_meaning_is_refused(make, message, unchecked):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_uniform_weight_goes_with_every_distance():
    assert Simple("eps", "l1", Uniform()).distance == "l1"


def test_l_vlb_needs_a_table_and_a_learned_variance(mixture):
    x0, t, eps = torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64)
    with pytest.raises(UsageError, match="L_vlb needs a schedule that is a table"):
        Variational()(mixture(Flow()), x0, t, eps)
    with pytest.raises(UsageError, match="this model learned none"):
        Hybrid()(mixture(table("linear")), x0, t, eps)


def test_errors_by_time_are_means_within_equal_bins():
    schedule = table("linear", 10)
    t = schedule.time_of_timestep(torch.tensor([0, 1, 6, 6, 9]))
    got = errors_by_time(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0]), t)
    assert got[[0, 1, 6, 9]].tolist() == [1, 2, 4, 8]
    assert bool(got[[2, 3, 4, 5, 7, 8]].isnan().all())
    assert (
        errors_by_time(torch.ones(1000), table("linear").time_of_timestep(torch.arange(1000)), 20).tolist() == [1] * 20
    )
