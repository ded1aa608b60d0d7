"""Fitted solvers: a table of weights is any multistep solver, and only on its own grid."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.levels import levels
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.registry import grids, samplers, schedules
from reverie.diffusion.samplers.base import State, run, sample
from reverie.diffusion.samplers.exponential import step_weights
from reverie.diffusion.samplers.learned import Learned, Recipe, as_recipe

F64 = torch.float64


def published(schedule, grid, order):
    """The table of DPM-Solver++ with exact weights, which are to add up to 1 a row."""
    lam = [level.lam for level in levels(schedule, grid[:-1].tolist())]
    rows = []
    for k in range(len(lam)):
        if k + 1 == len(lam):
            rows.append((1.0,))
            continue
        due = min(order, k + 1)
        weights = step_weights(lam[k], lam[k + 1], tuple(reversed(lam[k + 1 - due : k])), 0.0, "exact")
        rows.append(tuple(w / sum(weights) for w in weights))
    return Recipe(tuple(lam), tuple(rows))


@pytest.mark.parametrize("name", ["linear", "vp", "edm", "cosine-continuous", "flow"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp-3m", 3)])
def test_the_published_solvers_are_tables_too(name, sampler, order):
    schedule = schedules[name]()
    oracle, grid = random_mixture(2, 0, schedule), grids["log-snr"](schedule, 20)
    recipe = published(schedule, grid, order)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * schedule.prior_std(grid[:1])
    ends = []
    for rule, times in ((samplers[sampler](), grid), (Learned(recipe), recipe.grid(schedule))):
        *_, last = run(rule, oracle, rule.init(x, 1.0), times, Noise(range(4)))
        ends.append(last.x)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine", "edm", "flow"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "dpmpp-3m", "unipc", "deis", "lms"])
def test_a_multistep_sampler_is_read_off_as_a_recipe(name, sampler):
    schedule, rule = schedules[name](), samplers[sampler]()
    oracle, grid = random_mixture(2, 0, schedule), grids["karras"](schedule, 7)
    recipe = as_recipe(rule, schedule, grid)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * schedule.prior_std(grid[:1])
    ends = []
    for one, times in ((rule, grid), (Learned(recipe), recipe.grid(schedule))):
        *_, last = run(one, oracle, one.init(x, 1.0), times, Noise(range(4)))
        ends.append(last.x)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


def test_a_sampler_that_asks_twice_a_step_is_no_recipe():
    schedule = schedules["linear"]()
    with pytest.raises(UsageError, match="Heun asks 9 times in 5 steps"):
        as_recipe(samplers["heun"](), schedule, grids["karras"](schedule, 5))


def test_it_pauses_joins_and_goes_on():
    schedule = schedules["linear"]()
    oracle, grid = random_mixture(2, 0, schedule), grids["log-snr"](schedule, 6)
    sampler = Learned(published(schedule, grid, 3))
    own = sampler.recipe.grid(schedule)
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    states = list(run(sampler, oracle, sampler.init(x, 1.0), own, Noise(range(3))))
    half = State.join([states[2].rows([2]), states[2].rows([0, 1])])
    *_, last = run(sampler, oracle, half, own[3:], Noise([2, 0, 1]))
    torch.testing.assert_close(last.x[[1, 2, 0]], states[-1].x, rtol=0, atol=1e-12)


def test_a_step_that_is_not_its_own_is_refused():
    schedule = schedules["linear"]()
    oracle, grid = random_mixture(2, 0, schedule), grids["log-snr"](schedule, 4)
    sampler = Learned(published(schedule, grid, 2))
    state = sampler.init(torch.zeros(1, 2, dtype=F64), 1.0)
    with pytest.raises(UsageError, match=r"step 1 from t = 1 to 0\.5 is not one of this fitted solver, which has 4"):
        sampler.step(oracle, state, 0.5, Noise([0]))


@pytest.mark.parametrize(
    ("lam", "weights", "said"),
    [
        ((), (), "a row of 1 to k"),
        ((0.0,), ((0.5, 0.5),), "a row of 1 to k"),
        ((0.0, 1.0), ((1.0,),), "a row of 1 to k"),
        ((1.0, 1.0), ((1.0,), (1.0,)), "lambdas rise"),
        ((0.0,), ((float("nan"),),), "finite"),
    ],
)
def test_what_is_no_solver_is_refused(lam, weights, said):
    with pytest.raises(UsageError, match=said):
        Recipe(lam, weights)


@pytest.mark.parametrize(("kept", "said"), [((1.0, 1.0), "all but the last; 2 are given"), ((math.inf,), "finite")])
def test_what_is_kept_is_a_number_a_step_but_the_last(kept, said):
    with pytest.raises(UsageError, match=said):
        Recipe((-1.0, 0.0), ((1.0,), (1.0,)), kept)
    assert Recipe((-1.0, 0.0), ((1.0,), (1.0,))) == Recipe((-1.0, 0.0), ((1.0,), (1.0,)), (1.0,))


@pytest.mark.parametrize("name", ["linear", "cosine", "edm", "flow", "sub-vp"])
def test_one_that_begins_later_and_keeps_less_is_equation_1(name):
    """From noise alone of the first time's deviation, as any sampler is started there."""
    schedule = schedules[name]()
    oracle, recipe = random_mixture(2, 0, schedule), Recipe((-2.0, 0.5), ((0.9,), (1.2, -0.3)), (0.7,))
    grid, noise = recipe.grid(schedule), Noise(range(4))
    assert grid[0] < 1
    first, second = levels(schedule, grid[:-1].tolist())
    assert (first.lam, second.lam) == (pytest.approx(-2.0), pytest.approx(0.5))
    x = schedule.prior_std(grid[:1]) * noise((2,), [0] * 4).double()
    z, one = x / first.alpha, oracle(x, grid[:1].expand(4)).x0
    part = second.rho / first.rho
    z = 0.7 * part * z + (1 - part) * 0.9 * one
    want = 1.2 * oracle(second.alpha * z, grid[1:2].expand(4)).x0 - 0.3 * one
    got = sample(Learned(recipe), oracle, (2,), grid, noise)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_first_lambda_before_that_of_t_1_is_that_of_t_1():
    schedule = schedules["linear"]()
    start = schedule.log_snr(torch.ones(1, dtype=F64)).item() / 2
    for lam, at_start in ((-100.0, True), (start + 1e-6, True), (start + 0.01, False)):
        assert (Recipe((lam, 0.0), ((1.0,), (1.0,))).grid(schedule)[0].item() == 1) == at_start
