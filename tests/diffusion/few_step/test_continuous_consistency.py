"""Consistency in continuous time: the limit of the discrete loss, its minimum, and its pieces."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.few_step.common import consistency, held, time_of_ratio
from reverie.diffusion.few_step.continuous_consistency import ContinuousConsistency
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.probability_flow import angle, time_of_angle
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import schedules
from reverie.networks.mlp import MLP, MLPConfig

F64 = torch.float64
PLAIN = 1e6  # c so large that (3) is g / c


def gradient(network, loss):
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("name", ["cosine-continuous", "edm", "cosine"])
def test_its_gradient_is_the_limit_of_the_discrete_one(name):
    """|f(t) - stop f(t - d)|^2 / 2 d, has the slope of the continuous loss, but for factors."""
    torch.manual_seed(0)
    schedule = schedules[name]()
    network = MLP(MLPConfig(in_channels=2, width=16, layers=1, time_features="fourier")).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prediction = "edm" if name == "edm" else "v"
    denoiser = NetworkDenoiser(network, schedule, prediction)
    denoiser.prediction.clock = lambda schedule, t: t
    x0, eps = torch.tensor([[0.3, -0.8]], dtype=F64), torch.tensor([[1.1, 0.4]], dtype=F64)
    t = time_of_ratio(schedule, torch.ones(1, dtype=F64) * 0.8)
    phi = angle(schedule, t)
    ours = gradient(network, PLAIN * ContinuousConsistency(0, constant=PLAIN)(denoiser, x0, t, eps).sum())

    def discrete(gap):
        r = time_of_angle(schedule, phi - gap)
        f = consistency(denoiser, diffuse(schedule, x0, t, eps), t)
        before = held(denoiser, diffuse(schedule, x0, r, eps), r)
        # d/dphi of f times cos(phi), on F = (cos y - f) / sin: the factors of (2) and (3).
        factor = phi.cos() / phi.sin() / gap
        return gradient(network, (factor[:, None] * (f - before)).detach().mul(f).flatten(1).mean(1).sum() * 2)

    errors = [(discrete(gap) - ours).norm() / ours.norm() for gap in (1e-3, 5e-4)]
    assert errors[1] < 2e-2
    assert float(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


def test_the_exact_function_of_its_teacher_has_no_tangent(power, normal_pairs):
    x0, eps, _ = normal_pairs(4)
    t = torch.full((len(x0),), 0.3 / 80, dtype=F64)
    losses = {p: ContinuousConsistency(0, power(1.0))(power(p), x0, t, eps).max().item() for p in (0.5, 0.6)}
    assert losses[0.5] < 1e-12
    assert losses[0.6] > 1e-5


@pytest.mark.parametrize("distil", [True, False])
def test_its_minimum_is_the_probability_flow_map(slope, power, distil):
    """Data N(0, 1/4): the slope in the power changes its sign at 1/2, with no gap to leave a bias."""
    teacher = power(1.0) if distil else None
    objective = ContinuousConsistency(0, teacher, constant=PLAIN)
    at = {p: slope(objective, p, 0.3) for p in (0.45, 0.5, 0.55)}
    assert at[0.45] < 0 < at[0.55]
    assert abs(at[0.5]) < 1e-6 * at[0.55]


def test_at_the_start_of_the_warm_up_it_is_flow_matching(power, normal_pairs):
    """w = 0: g is -cos^2 (F - dy/dphi), and the minimum the posterior mean."""
    x0, eps, weights = normal_pairs(6)
    t = torch.full((len(x0),), 0.3 / 80, dtype=F64)
    slopes = []
    for p in (0.9, 1.0, 1.1):
        denoiser, objective = power(p), ContinuousConsistency(100, constant=PLAIN)
        (weights * objective(denoiser, x0, t, eps)).sum().backward()
        slopes.append(denoiser.power.grad.item())
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 1e-6 * slopes[2]


def test_the_warm_up_and_the_normalisation(power, normal_pairs):
    x0, eps, _ = normal_pairs(4)
    phi = angle(power(0.5).schedule, torch.full((len(x0),), 0.5, dtype=F64))
    objective = ContinuousConsistency(10, constant=1e-9)
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        objective.begin(step)
        assert objective.share == share
    y = per_sample(phi.cos(), x0) * x0 + per_sample(phi.sin(), x0) * eps
    _, g = objective.tangent(power(0.7), y, phi, eps, None)
    torch.testing.assert_close(g.abs(), torch.ones_like(g))
    assert math.isfinite(g.sum().item())


def test_the_oracle_of_a_mixture_has_a_loss_and_its_exact_map_little(gaussian):
    oracle = gaussian(schedules["flow"]())
    x0, eps = oracle.draw(5, 0), torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    phi = angle(oracle.schedule, torch.full((5,), 0.6, dtype=F64))
    assert not Exact(oracle)(x0, torch.full((5,), 0.6, dtype=F64)).x0.requires_grad
    _, g = ContinuousConsistency(0, oracle, PLAIN).tangent(oracle, x0, phi, eps, None)
    assert g.abs().max() > 1e-9


@pytest.mark.parametrize("options", [{"warmup": -1}, {"constant": 0.0}])
def test_what_is_refused(options):
    with pytest.raises(UsageError, match="must be"):
        ContinuousConsistency(**options)
