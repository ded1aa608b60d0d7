"""Score matching against exact mathematics: closed forms, and integrals on grids.

The trapezoid rule on a line or a plane is exact up to rounding for densities that fall off as Gaussians do.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate, NetworkDenoiser
from reverie.diffusion.objectives import Simple
from reverie.diffusion.oracles import Gaussian, Mixture
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import predictions
from reverie.diffusion.schedules import VE, VP, Flow, table
from reverie.diffusion.score_matching import (
    LEVEL_WEIGHTS,
    Denoising,
    Implicit,
    Sliced,
    curvature,
    draw_directions,
    fisher_divergence,
    implicit,
    score,
    sliced,
)
from reverie.networks.mlp import MLP, MLPConfig
from reverie.networks.unet import UNet, UNetConfig

F64 = torch.float64
TIMES = {"tiny": 1e-9, "early": 0.2, "late": 0.6}  # at the first, sigma is 1e-5 and the data as good as clean


def planar(schedule):
    """A mixture of three in the plane, its modes within sight of each other."""
    means = torch.tensor([[-1.0, 0.4], [0.8, -0.5], [0.2, 1.1]], dtype=F64)
    stds = torch.tensor([[0.5, 0.4], [0.4, 0.6], [0.45, 0.45]], dtype=F64)
    return Mixture(means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=F64), schedule)


def linear_mixture(schedule):
    """A mixture of two on a line."""
    means, stds = torch.tensor([[-0.9], [0.7]], dtype=F64), torch.tensor([0.5, 0.3], dtype=F64)
    return Mixture(means, stds, torch.tensor([0.4, 0.6], dtype=F64), schedule)


class Bent(Denoiser):
    """An oracle whose score has something added to it."""

    def __init__(self, oracle, bend, size=0.1):
        super().__init__()
        self.oracle, self.schedule, self.bend, self.size = oracle, oracle.schedule, bend, size

    def forward(self, x, t, condition=None):
        estimate, sigma = self.oracle(x, t), per_sample(self.schedule.sigma(t), x)
        return Estimate(estimate.x0, estimate.eps - sigma * self.size * self.bend(x))  # no loss here looks at x0


# Bounded or slow in growth, gradients and not.
BENDS = {
    "constant": torch.ones_like,
    "scaled": lambda x: x,
    "turned": lambda x: x.flip(-1) * torch.tensor([1.0, -1.0], dtype=F64)[: x.shape[-1]],
    "sheared": lambda x: torch.tanh(x).flip(-1),
    "wavy": lambda x: torch.sin(3 * x),
}


def plane(oracle, t, count=161):
    """Points (N, 2), their times (N,), and their shares (N,) of the density at t."""
    alpha, sigma = (value.item() for value in oracle.schedule.marginal(torch.tensor(t, dtype=F64)))
    half = 1.2 * alpha + 8 * math.hypot(0.6 * alpha, sigma)
    line = torch.linspace(-half, half, count, dtype=F64)
    x = torch.cartesian_prod(line, line)
    times = torch.full((len(x),), t, dtype=F64)
    return x, times, oracle.log_prob(x, times).exp() * (line[1] - line[0]) ** 2


def at(objective, denoiser, x, t):
    """The losses (N,) at noisy data itself, for objectives that look at nothing else."""
    return objective(denoiser, x / per_sample(denoiser.schedule.alpha(t), x), t, torch.zeros_like(x)).detach()


def trace(oracle, x, t):
    """tr of the Hessian of ln p_t, worked out by hand: sum_k r_k (|C_k^-1 (x - m_k)|^2 - tr C_k^-1) - |s|^2."""
    alpha, sigma = (value[:, None, None] for value in oracle.schedule.marginal(t))
    covariance = alpha**2 * oracle.stds**2 + sigma**2
    pull = (x[:, None] - alpha * oracle.means) / covariance
    each = pull.square().sum(-1) - (1 / covariance).sum(-1)
    return (oracle.parts(x, t).responsibility * each).sum(1) - oracle.score(x, t).square().sum(1)


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("schedule", [VE(), VP(), Flow()], ids=lambda s: type(s).__name__)
def test_the_implicit_loss_of_a_mixture_is_its_closed_form(schedule, t):
    """At each point; and in the mean -1/2 E |s*|^2 for each element, by parts."""
    oracle = planar(schedule)
    x, times, share = plane(oracle, t)
    want = (trace(oracle, x, times) + oracle.score(x, times).square().sum(1) / 2) / 2
    got = at(Implicit("uniform"), oracle, x, times)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert share.sum().item() == pytest.approx(1, abs=1e-8)
    by_parts = -(share * oracle.score(x, times).square().sum(1)).sum().item() / 4
    assert (share * got).sum().item() == pytest.approx(by_parts, rel=1e-8)


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
def test_between_two_gaussians_every_loss_is_a_closed_form(t):
    """Data N(a, A), score -P (x - b): tr E ds/dx = -tr P, E |s|^2 = tr(P A P) + |P (a - b)|^2; exact by quadrature."""
    schedule = VP()
    a, b = torch.tensor([0.3, -0.4], dtype=F64), torch.tensor([-0.2, 0.5], dtype=F64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.8]], dtype=F64)
    model = Gaussian(b, torch.tensor([[0.9, -0.3], [-0.3, 0.6]], dtype=F64), schedule)
    alpha, sigma = (value.item() for value in schedule.marginal(torch.tensor(t, dtype=F64)))
    eye = torch.eye(2, dtype=F64)
    noisy = alpha**2 * covariance + sigma**2 * eye
    pull = torch.linalg.inv(alpha**2 * torch.tensor([[0.9, -0.3], [-0.3, 0.6]], dtype=F64) + sigma**2 * eye)
    square = (pull @ noisy @ pull).trace() + (alpha * pull @ (a - b)).square().sum()
    want = (-pull.trace() + square / 2) / 2

    z, w = np.polynomial.hermite_e.hermegauss(3)  # exact for degree 5
    nodes = torch.tensor(list(itertools.product(z, repeat=4)), dtype=F64)
    weight = torch.tensor(list(itertools.product(w / w.sum(), repeat=4)), dtype=F64).prod(1)
    x0, eps = a + nodes[:, :2] @ torch.linalg.cholesky(covariance).mT, nodes[:, 2:]
    times = torch.full((len(x0),), t, dtype=F64)

    def mean(loss):
        return (weight * loss.detach()).sum()

    torch.testing.assert_close(mean(Implicit("uniform")(model, x0, times, eps)), want, rtol=1e-9, atol=0)

    # E |s + eps / sigma|^2 = E |s|^2 + 2 / sigma E s.eps + 2 / sigma^2, and E s.eps = -sigma tr P.
    target = 2 / sigma**2 - 2 * pull.trace()
    want_dsm = (square + target) / 4
    torch.testing.assert_close(mean(Denoising("uniform")(model, x0, times, eps)), want_dsm, rtol=1e-9, atol=0)

    # All four directions of signs at each point.
    x = diffuse(schedule, x0, times, eps)
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=2)), dtype=F64)[:, None].expand(-1, *x.shape)
    for reduced in (True, False):
        loss = sliced(lambda x: score(model, x, times), x, signs, reduced)
        torch.testing.assert_close(mean(loss), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("bend", BENDS)
def test_the_sliced_loss_is_the_implicit_one_in_expectation_over_directions(bend, reduced):
    """By the sum over all signs, and by Gaussian quadrature, which is exact: the loss is quadratic in v."""
    denoiser = Bent(planar(VE()), BENDS[bend])
    x, t = denoiser.oracle.draw(50), torch.full((50,), 0.3, dtype=F64)

    def field(x):
        return score(denoiser, x, t)

    want = implicit(field, x).detach()
    z, w = np.polynomial.hermite_e.hermegauss(3)
    for nodes, weights in (([1.0, -1.0], [0.5, 0.5]), (z, w / w.sum())):
        v = torch.tensor(list(itertools.product(nodes, repeat=2)), dtype=F64)
        share = torch.tensor(list(itertools.product(weights, repeat=2)), dtype=F64).prod(1)
        losses = torch.stack([sliced(field, x, row.expand(1, *x.shape), reduced).detach() for row in v])
        torch.testing.assert_close(share @ losses, want, rtol=1e-10, atol=1e-10)


# Fisher's divergence, but for a constant --------------------------------------------------------


@pytest.mark.parametrize("bend", BENDS)
def test_the_implicit_loss_rises_from_the_exact_score_by_the_fisher_divergence(bend):
    """So that its least value is there: whatever is added to the score, the loss gains 1/2 size^2 E |bend|^2."""
    oracle = planar(VP())
    x, t, share = plane(oracle, 0.2)
    bent = Bent(oracle, BENDS[bend])
    gain = (share * (at(Implicit("uniform"), bent, x, t) - at(Implicit("uniform"), oracle, x, t))).sum()
    fisher = (share * fisher_divergence(bent, oracle, x, t)).sum()
    torch.testing.assert_close(gain, fisher, rtol=1e-7, atol=0)
    by_hand = 0.01 * (share[:, None] * BENDS[bend](x).square()).sum() / 4
    torch.testing.assert_close(fisher, by_hand, rtol=1e-9, atol=0)
    assert gain > 1e-4


def test_two_models_differ_in_the_implicit_loss_as_in_the_fisher_divergence():
    """Models far from the truth: the mixture's two wrong means, and one Gaussian."""
    oracle, schedule = planar(VP()), VP()
    other = Mixture(oracle.means.flip(1), oracle.stds, oracle.weights, schedule)
    bell = Gaussian(torch.tensor([0.1, 0.2], dtype=F64), torch.eye(2, dtype=F64), schedule)
    x, t, share = plane(oracle, 0.3)
    losses = [(share * at(Implicit("uniform"), model, x, t)).sum() for model in (other, bell)]
    fisher = [(share * fisher_divergence(model, oracle, x, t)).sum() for model in (other, bell)]
    torch.testing.assert_close(losses[0] - losses[1], fisher[0] - fisher[1], rtol=1e-7, atol=0)
    assert min(fisher) > 0.02


@pytest.mark.parametrize("reduced", [True, False])
def test_the_sliced_loss_rises_from_the_exact_score_by_the_fisher_divergence(reduced):
    oracle = planar(VP())
    x, t, share = plane(oracle, 0.2)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)[:, None].expand(-1, *x.shape)  # -v is as v

    def mean(denoiser):
        return (share * sliced(lambda x: score(denoiser, x, t), x, signs, reduced).detach()).sum()

    for bend in BENDS.values():
        gain = mean(Bent(oracle, bend)) - mean(oracle)
        torch.testing.assert_close(
            gain, (share * fisher_divergence(Bent(oracle, bend), oracle, x, t)).sum(), rtol=1e-6, atol=0
        )
        assert gain > 1e-4


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_the_denoising_loss_is_the_fisher_divergence_and_its_constant(t):
    """1/2 E |s - s*|^2 + 1/(2 sigma^2) - 1/2 E |s*|^2, on a line, by the trapezoid rule over x_0 and eps."""
    schedule = VP()
    oracle = linear_mixture(schedule)
    line = torch.linspace(-8, 8, 401, dtype=F64)
    x0, eps = torch.cartesian_prod(line, line).split(1, 1)
    times = torch.full((len(x0),), t, dtype=F64)
    density = oracle.log_prob(x0) - eps[:, 0].square() / 2 - math.log(2 * math.pi) / 2
    share = density.exp() * (line[1] - line[0]) ** 2
    x = diffuse(schedule, x0, times, eps)
    constant = (1 / schedule.variance(times[0]) - (share * oracle.score(x, times).square()[:, 0]).sum()) / 2
    denoisers = [oracle, *(Bent(oracle, bend) for bend in BENDS.values())]
    losses = [(share * Denoising("uniform")(denoiser, x0, times, eps)).sum() for denoiser in denoisers]
    for denoiser, loss in zip(denoisers, losses, strict=True):
        fisher = (share * fisher_divergence(denoiser, oracle, x, times)).sum()
        torch.testing.assert_close(loss, fisher + constant, rtol=1e-8, atol=0)
        assert denoiser is oracle or loss > losses[0] + 1e-4


@pytest.mark.parametrize("name", predictions)
def test_denoising_score_matching_is_half_of_l_simple_in_another_dress(schedule, name, mixture, knowing):
    """Whatever the network predicts: sigma^2 |s + eps / sigma|^2 is |E - eps|^2."""
    oracle, prediction = mixture(schedule), predictions[name]()
    if schedule.zero_terminal_snr and not prediction.at_zero_signal:
        return
    denoiser = NetworkDenoiser(knowing(oracle, prediction), schedule, prediction)
    t = schedule.time(torch.tensor([5.0, 1.0, -2.0], dtype=F64))
    x0, eps = oracle.draw(3), torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    simple = Simple("eps")(denoiser, x0, t, eps)
    torch.testing.assert_close(Denoising()(denoiser, x0, t, eps), simple / 2, rtol=1e-9, atol=1e-12)
    score_space = Simple("score")(denoiser, x0, t, eps)
    torch.testing.assert_close(Denoising("uniform")(denoiser, x0, t, eps), score_space / 2, rtol=1e-9, atol=1e-12)


# Directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_drawn_directions_give_the_implicit_loss_in_the_mean(kind, reduced, slices):
    """One point 40,000 times over: a z-test at 4.5, so that a false alarm comes in 1 run of 18,000 (8 cases)."""
    denoiser, count = Bent(planar(VE()), BENDS["sheared"], 2.0), 40_000
    x, t = torch.tensor([[0.3, -0.8]], dtype=F64), torch.full((count,), 0.3, dtype=F64)
    x0, eps = x.expand(count, 2), torch.zeros(count, 2, dtype=F64)
    losses = Sliced("uniform", kind, slices, reduced)(denoiser, x0, t, eps).detach()
    want = Implicit("uniform")(denoiser, x, t[:1], eps[:1]).item()
    error = losses.std().item() / math.sqrt(count)
    assert abs(losses.mean().item() - want) < 4.5 * error
    assert error > 0.001 * abs(want)  # there is something to average


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_variance_over_directions_is_hutchinsons(kind, reduced, slices):
    """2 |A|^2 for Gaussian directions, without the diagonal for signs, over the slices: A is the symmetric part of
    ds/dx where the variance is reduced, and where it is not, of ds/dx + 1/2 s s^T (which may well be less).

    40,000 draws: the sample variance of chi-squares with one degree of freedom has a relative error of about
    sqrt(14 / 40,000) = 1.9 %, so that 9 % is 4.8 of them: a false alarm in fewer than 1 run of 50,000 (8 cases).
    """
    denoiser, count = Bent(planar(VE()), BENDS["sheared"], 2.0), 40_000
    x, t = torch.tensor([[0.3, -0.8]], dtype=F64), torch.full((count,), 0.3, dtype=F64)
    matrix = torch.autograd.functional.jacobian(lambda x: score(denoiser, x, t[:1])[0], x)[:, 0]
    if not reduced:
        matrix = matrix + score(denoiser, x, t[:1]).mT @ score(denoiser, x, t[:1]) / 2
    matrix = (matrix + matrix.mT) / 2
    if kind == "rademacher":
        matrix = matrix - matrix.diag().diag()
    want = 2 * matrix.square().sum() / slices / 4  # the loss is halved: two elements
    losses = Sliced("uniform", kind, slices, reduced)(denoiser, x.expand(count, 2), t, torch.zeros(count, 2, dtype=F64))
    assert losses.detach().var().item() == pytest.approx(want.item(), rel=0.09)


def test_directions_are_fixed_by_the_noise_and_the_seed():
    eps = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    v = draw_directions("rademacher", 4, eps)
    assert v.shape == (4, 6, 3, 2)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(v, draw_directions("rademacher", 4, eps.clone()))
    assert torch.equal(v, draw_directions("rademacher", 4, eps.mT.contiguous().mT))  # in another layout
    assert not torch.equal(v, draw_directions("rademacher", 4, eps, seed=1))
    assert not torch.equal(v, draw_directions("rademacher", 4, eps.nextafter(eps + 1)))
    gaussian = draw_directions("gaussian", 4, eps.double())
    assert gaussian.dtype == F64
    assert len(gaussian.unique()) == gaussian.numel()


def test_directions_have_unit_second_moments():
    """20,000 draws in three dimensions: each of 2 x 6 moments within 4.5 errors, a false alarm in 1 run of 12,000."""
    for kind in ("rademacher", "gaussian"):
        v = draw_directions(kind, 1, torch.zeros(20_000, 3, dtype=F64))[0]
        products = v[:, :, None] * v[:, None]
        error = products.std(0) / math.sqrt(len(v)) + 1e-12
        assert ((products.mean(0) - torch.eye(3, dtype=F64)).abs() <= 4.5 * error).all()


# Learning -------------------------------------------------------------------------------------


class Line(Denoiser):
    """The score b - P x, its numbers to be learned."""

    def __init__(self, pull, shift):
        super().__init__()
        self.schedule, self.pull, self.shift = VE(), nn.Parameter(pull), nn.Parameter(shift)

    def forward(self, x, t, condition=None):
        return Estimate(x, -per_sample(self.schedule.sigma(t), x) * (self.shift - x @ self.pull.mT))


@pytest.mark.parametrize(
    "objective",
    [Implicit("uniform"), Sliced("uniform", slices=20), Sliced("uniform", "gaussian", 20)],
    ids=["implicit", "rademacher", "gaussian"],
)
def test_for_a_gaussian_model_score_matching_is_maximum_likelihood(objective):
    """On any sample the implicit loss is least at P = S^-1, b = S^-1 m, S and m the sample's own.

    The sliced loss has there a gradient of noise alone, the mean of 1/2 (I - v v^T) over 400,000 directions: 0.006
    is 5 errors of it or more (sqrt(2) / 2 / sqrt(400,000) = 0.0011), a false alarm in fewer than 1 run of 200,000.
    """
    x = planar(VE()).draw(20).repeat(1000, 1)
    t, eps = torch.full((len(x),), 1e-9, dtype=F64), torch.zeros(len(x), 2, dtype=F64)
    inverse = torch.linalg.inv(torch.cov(x.mT, correction=0))
    model = Line(inverse, inverse @ x.mean(0))
    for slope in torch.autograd.grad(objective(model, x, t, eps).mean(), list(model.parameters())):
        assert slope.abs().max() < (1e-9 if isinstance(objective, Implicit) else 0.006)
    elsewhere = Line(1.3 * inverse, inverse @ x.mean(0))
    slope, _ = torch.autograd.grad(objective(elsewhere, x, t, eps).mean(), list(elsewhere.parameters()))
    assert slope.abs().max() > 0.1


OBJECTIVES = {
    "denoising": Denoising(),
    "likelihood": Denoising("likelihood"),
    "implicit": Implicit(),
    "sliced": Sliced(slices=2, reduced=False),
    "sliced-vr": Sliced(slices=2),
}


def shaken(network):
    """A network in float64 with no parameter left at zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.double()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_the_gradient_is_the_slope_of_the_loss(name, kind):
    """Through attention too, whose fused kernels have no second derivative."""
    if kind == "mlp":
        network, shape = shaken(MLP(MLPConfig(width=8, layers=1, num_class_embeds=3))), (2,)
    else:
        config = UNetConfig(in_channels=1, channels=(4, 8), layers=1, attention=(True, False), num_class_embeds=3)
        network, shape = shaken(UNet(config)), (1, 4, 4)
    denoiser, parameters = NetworkDenoiser(network, VP(), "eps"), [p for p in network.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 3, *shape, dtype=F64, generator=generator)
    t, condition = torch.tensor([0.1, 0.4, 0.9], dtype=F64), {"label": torch.tensor([0, 1, 2])}

    def loss():
        return OBJECTIVES[name](denoiser, x0, t, eps, condition).mean()

    slopes = torch.autograd.grad(loss(), parameters)
    assert all(slope.isfinite().all() for slope in slopes)
    assert sum(bool((slope != 0).any()) for slope in slopes) > 0.8 * len(slopes)
    steps = [torch.randn(p.shape, dtype=F64, generator=generator) for p in parameters]
    want = sum((slope * step).sum() for slope, step in zip(slopes, steps, strict=True)).item()
    values = []
    with torch.no_grad():
        for size in (1e-5, -2e-5):
            for parameter, step in zip(parameters, steps, strict=True):
                parameter += size * step
            values.append(loss().item())
    assert want == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_without_gradients_the_value_is_the_same_and_keeps_no_graph():
    denoiser = NetworkDenoiser(shaken(MLP(MLPConfig(width=8, layers=1))), VP(), "eps")
    x0, eps = torch.randn(2, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 5, dtype=F64)
    for objective in OBJECTIVES.values():
        with torch.no_grad():
            silent = objective(denoiser, x0, t, eps)
        assert not silent.requires_grad
        torch.testing.assert_close(silent, objective(denoiser, x0, t, eps).detach(), rtol=1e-12, atol=0)


# Weights, rows, refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Denoising, Implicit, Sliced])
def test_weights_multiply_the_loss(schedule, make, mixture):
    oracle, t = mixture(schedule), schedule.time(torch.tensor([4.0, 1.0, -2.0], dtype=F64))
    x0, eps = oracle.draw(3), torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    plain = make("uniform")(oracle, x0, t, eps).detach()
    sigma, g = schedule.sigma(t), schedule.diffusion(t)
    edm = sigma**2 * (1 + (sigma / (0.5 * schedule.alpha(t))) ** 2)
    wanted = {"uniform": 1.0, "variance": sigma**2, "likelihood": g**2, "edm": edm}
    assert set(wanted) == set(LEVEL_WEIGHTS)
    for name, factor in wanted.items():
        torch.testing.assert_close(make(name)(oracle, x0, t, eps).detach(), factor * plain, rtol=1e-9, atol=1e-15)
    own = make(lambda schedule, t: 3 * schedule.sigma(t))(oracle, x0, t, eps).detach()
    torch.testing.assert_close(own, 3 * sigma * plain, rtol=1e-12, atol=0)


def test_losses_are_means_over_elements_in_any_shape():
    """The same sixteen numbers in a row or as an image; float32 stays float32."""
    for shape in ((16,), (1, 4, 4)):
        bell = Mixture(torch.zeros(1, *shape), torch.ones(1), torch.ones(1), VE())
        x0, eps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((3,), 0.5, dtype=F64)
        x, variance = diffuse(VE(), x0, t, eps).flatten(1), 1 + VE().variance(t).float()
        want = -1 / variance + (x / variance[:, None]).square().mean(1) / 2
        for objective in (Implicit("uniform"), Sliced("uniform")):
            loss = objective(bell, x0, t, eps)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-6)


def test_a_rows_loss_does_not_depend_on_its_neighbours(mixture):
    oracle = mixture(VP())
    x0, eps = oracle.draw(5), torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 5, dtype=F64)
    for objective in (Denoising(), Implicit()):
        together = objective(oracle, x0, t, eps).detach()
        for i in range(5):
            alone = objective(oracle, x0[i : i + 1], t[i : i + 1], eps[i : i + 1]).detach()
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=0)


def test_a_field_that_does_not_look_at_x_has_no_curvature():
    shift = torch.ones(1, 2, requires_grad=True)
    s, products = curvature(lambda x: shift.expand(3, 2), torch.zeros(3, 2), torch.ones(4, 3, 2))
    assert products.tolist() == [[0.0] * 3] * 4
    assert s.tolist() == [[1.0, 1.0]] * 3


def test_the_score_is_the_oracles_at_every_level(schedule, mixture):
    oracle = mixture(schedule)
    t = torch.cat(
        [schedule.time(torch.tensor([30.0, 4.0, -2.0], dtype=F64)), torch.tensor([schedule.t_min], dtype=F64)]
    )
    x = diffuse(schedule, oracle.draw(4), t, torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(score(oracle, x, t), oracle.score(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoising("varianc"), "did you mean variance"),
        (lambda: Implicit("sigma"), "there is no level weight 'sigma'"),
        (lambda: Sliced(directions="sphere"), "directions are 'sphere'"),
        (lambda: Sliced(slices=0), "slices is 0"),
    ],
)
def test_what_has_no_meaning_is_refused(make, message, unchecked):
    with pytest.raises(UsageError, match=message):
        make()


def test_the_data_itself_and_traces_of_many_elements_are_refused():
    oracle = planar(table("linear"))
    x0, eps = oracle.draw(2), torch.zeros(2, 2, dtype=F64)
    for objective in (Denoising(), Implicit(), Sliced()):
        with pytest.raises(UsageError, match=r"t = 0, where sigma is 0; take a later t, such as 0.001"):
            objective(oracle, x0, torch.tensor([0.5, 0.0], dtype=F64), eps)
    t = torch.full((2,), 0.5, dtype=F64)
    with pytest.raises(UsageError, match=r"exact trace of 2 elements .* limit is 1; use Sliced"):
        Implicit(most=1)(oracle, x0, t, eps)
    assert Implicit(most=2)(oracle, x0, t, eps).shape == (2,)
