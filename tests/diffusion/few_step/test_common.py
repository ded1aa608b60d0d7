"""The consistency function, its boundary, its distance, and the step of the teacher's ODE."""

import math

import pytest
import torch
from torch import nn

from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.few_step.common import (
    HUBER,
    both,
    consistency,
    distance,
    gap,
    held,
    noise_ratio,
    ode_step,
    time_of_ratio,
)
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.predictions import ConsistencyOutput
from reverie.diffusion.registry import predictions, schedules
from reverie.diffusion.schedules import EDM, Flow

F64 = torch.float64


class Wild(nn.Module):
    """A network that nobody trained."""

    def forward(self, x, time):
        return (3 * x).sin() + 2


def test_times_and_ratios_are_each_others_inverse(schedule, times):
    t = times(schedule, 50, 0.99)
    torch.testing.assert_close(time_of_ratio(schedule, noise_ratio(schedule, t)), t, rtol=1e-6, atol=1e-9)
    assert time_of_ratio(schedule, torch.zeros(1, dtype=F64)).item() == 0


@pytest.mark.parametrize("name", ["eps", "v", "score", "velocity", "edm"])
def test_the_boundary_holds_for_any_network(name):
    denoiser = NetworkDenoiser(Wild(), schedules["vp"](), name)
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    errors = []
    for t in (2e-3, 2e-5):
        denoiser.schedule.t_min = 1e-9
        t = torch.full((5,), t, dtype=F64)
        errors.append((consistency(denoiser, x, t) - x / denoiser.schedule.alpha(t)[:, None]).abs().max().item())
    assert errors[1] < 0.11 * errors[0]
    assert torch.equal(consistency(denoiser, x, torch.zeros(5, dtype=F64)), x)


def test_the_prediction_consistency_has_its_boundary_at_its_least_noise():
    schedule = EDM()
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.full((5,), schedule.t_min, dtype=F64)
    assert torch.equal(NetworkDenoiser(Wild(), schedule, ConsistencyOutput())(x, t).x0, x)
    assert not torch.equal(NetworkDenoiser(Wild(), schedule, "edm")(x, t).x0, x)


def test_with_its_boundary_at_0_it_is_edms():
    alpha, sigma = torch.tensor([0.9, 0.3], dtype=F64), torch.tensor([0.2, 0.8], dtype=F64)
    one, other = ConsistencyOutput(0.7, 0.0), predictions["edm"](0.7)
    for a, b in zip(one.decoding(alpha, sigma), other.decoding(alpha, sigma), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_its_decoding_undoes_its_encoding():
    prediction = ConsistencyOutput()
    alpha, sigma = torch.tensor([1.0, 0.3], dtype=F64), torch.tensor([0.02, 0.8], dtype=F64)
    x0, eps = torch.tensor([[0.3], [-2.0]], dtype=F64), torch.tensor([[1.3], [0.4]], dtype=F64)
    back = prediction.decode(
        prediction.encode(x0, eps, alpha, sigma), alpha[:, None] * x0 + sigma[:, None] * eps, alpha, sigma
    )
    torch.testing.assert_close(back.x0, x0)
    torch.testing.assert_close(back.eps, eps)


def test_the_distance_is_the_papers_over_the_root_of_the_count():
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    c = 0.00054 * math.sqrt(15)
    paper = ((a - b).square().sum((1, 2)) + c**2).sqrt() - c
    torch.testing.assert_close(distance(a, b, HUBER), paper / math.sqrt(15))


def test_its_slope_is_finite_where_there_is_no_difference():
    a = torch.zeros(2, 3, requires_grad=True)
    distance(a, torch.zeros(2, 3)).sum().backward()
    assert torch.equal(a.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["edm", "vp", "flow", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_a_step_of_the_ode_has_its_local_order(name, solver, order, gaussian):
    """The error of one step from s = 1 against the closed form: halving the step divides it by 2^order."""
    oracle = gaussian(schedules[name]())
    x = oracle.schedule.alpha(time_of_ratio(oracle.schedule, torch.ones(1, dtype=F64))) * torch.tensor([[1.4, -0.3]])
    t = time_of_ratio(oracle.schedule, torch.ones(1, dtype=F64))
    errors = []
    for width in (0.04, 0.02):
        r = time_of_ratio(oracle.schedule, torch.tensor([1 - width], dtype=F64))
        errors.append((ode_step(oracle, x, t, r, None, solver) - oracle.flow(x, t, r)).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_steps_to_the_data_and_from_pure_noise_are_eulers(gaussian):
    oracle = gaussian(Flow())
    x = torch.randn(2, 2, dtype=F64)
    t, r = torch.tensor([1.0, 0.5], dtype=F64), torch.tensor([0.5, 0.0], dtype=F64)
    assert torch.equal(ode_step(oracle, x, t, r), ode_step(oracle, x, t, r, None, "euler"))


def test_the_target_has_no_gradient(power):
    assert not held(power(0.5), torch.ones(1, 1, dtype=F64), torch.full((1,), 0.5, dtype=F64)).requires_grad


def test_the_gap_is_that_of_the_ratios():
    t, r = torch.tensor([0.5], dtype=F64), torch.tensor([0.25], dtype=F64)
    assert gap(Flow(), t, r).item() == pytest.approx(1 - 1 / 3)


def test_both_see_the_same_dropout():
    torch.manual_seed(0)
    x = torch.ones(1000)
    one, other = both(lambda: nn.functional.dropout(x), lambda: nn.functional.dropout(x), x.device)
    assert torch.equal(one, other)
    assert not torch.equal(other, nn.functional.dropout(x))  # and the generator went on


def test_the_exact_map_by_integration_is_the_closed_form(gaussian):
    oracle = gaussian(EDM())
    mixture = Mixture(
        torch.tensor([[0.3, -0.2]], dtype=F64), torch.tensor([[0.5, 0.4]], dtype=F64), torch.ones(1, dtype=F64), EDM()
    )
    same = type(oracle)(torch.tensor([0.3, -0.2], dtype=F64), torch.diag(torch.tensor([0.25, 0.16], dtype=F64)), EDM())
    x = torch.tensor([[5.0, 20.0], [0.3, 0.1]], dtype=F64)
    t = torch.tensor([0.5, 0.01], dtype=F64)
    torch.testing.assert_close(Exact(mixture)(x, t).x0, Exact(same)(x, t).x0, rtol=1e-4, atol=1e-5)
