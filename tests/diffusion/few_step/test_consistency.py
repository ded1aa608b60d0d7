"""Distillation and training on a grid: levels, curriculum, and the loss of the exact function."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.few_step.common import noise_ratio, time_of_ratio
from reverie.diffusion.few_step.consistency import Consistency, doubling, karras_levels
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.grids import karras
from reverie.diffusion.registry import schedules
from reverie.diffusion.schedules import EDM

F64 = torch.float64


def test_the_levels_are_karras():
    levels = karras_levels(EDM(), 18, 0.002)
    torch.testing.assert_close(levels.flip(0), noise_ratio(EDM(), karras(EDM(), 18)[:-1]))
    assert karras_levels(schedules["cosine"](), 18)[-1].item() == pytest.approx(80)  # beyond it there is no data left


def test_n_doubles_as_in_the_paper():
    """K' = floor(800 / (log2(128) + 1)) = 100."""
    steps = [doubling(k, 800) for k in (0, 99, 100, 200, 300, 600, 700, 799)]
    assert steps == [11, 11, 21, 41, 81, 641, 1281, 1281]
    assert doubling(10**9, 800) == 1281


@pytest.mark.parametrize("name", ["edm", "cosine", "flow"])
def test_the_pair_are_the_levels_around_t(name):
    schedule, objective = schedules[name](), Consistency(steps=10)
    s = torch.tensor([1e-9, 0.5, 3.0, 79.0, 1e3], dtype=F64).clamp(max=noise_ratio(schedule, torch.ones(1).double())[0])
    t, r = objective.pair(schedule, time_of_ratio(schedule, s))
    levels = karras_levels(schedule, 11)
    for high, low, level in zip(noise_ratio(schedule, t), noise_ratio(schedule, r), s.clamp(max=79.99), strict=True):
        assert float(low) <= float(level) + 1e-6 <= float(high) + 2e-6
        k = int((levels - float(high)).abs().argmin())
        torch.testing.assert_close(torch.stack([low, high]), levels[[k - 1, k]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 3), ("heun", 5)])
def test_the_exact_function_has_no_loss_but_that_of_the_solver(gaussian, solver, order):
    """The loss is quadratic in the error of a step, which is of order 2 or 3, over the step."""
    oracle = gaussian(EDM())
    t = time_of_ratio(EDM(), torch.ones(20, dtype=F64))
    x0, eps = oracle.draw(20, 1), torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    losses = [
        Consistency(teacher=oracle, last=last, solver=solver, width=1.0)(Exact(oracle), x0, t, eps).mean().item()
        for last in (50, 200)
    ]
    assert losses[0] < 1e-3
    assert math.log(losses[0] / losses[1], 4) == pytest.approx(order, abs=0.5)


def test_any_other_function_has_a_loss(gaussian):
    oracle = gaussian(EDM())
    t = time_of_ratio(EDM(), torch.ones(20, dtype=F64))
    x0, eps = oracle.draw(20, 1), torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = Consistency(teacher=oracle, last=50, width=1.0)
    assert objective(oracle, x0, t, eps).mean() > 100 * objective(Exact(oracle), x0, t, eps).mean()


@pytest.mark.parametrize("distil", [True, False])
def test_its_minimum_is_the_probability_flow_map(slope, power, distil):
    """Data N(0, 1/4): the slope in the power changes its sign at 1/2."""
    teacher = power(1.0) if distil else None
    objective = Consistency(teacher=teacher, first=4000, last=4000, width=100.0)
    at = {p: slope(objective, p, 0.3) for p in (0.45, 0.5, 0.55)}
    assert at[0.45] < 0 < at[0.55]
    assert abs(at[0.5]) < 0.03 * at[0.55]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "at least 1"),
        ({"first": 20, "last": 10}, "last at least first"),
        ({"boundary": -1.0}, "boundary"),
        ({"width": 0.0}, "positive"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Consistency(**options)
