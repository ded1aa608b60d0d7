"""Polishing: its derivatives against differences of whole walks, and that it does what it is for."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from reverie.base.randomness import normal
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import karras
from reverie.diffusion.levels import levels
from reverie.diffusion.oracle_stack import MixtureStack
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.polish import (
    Aim,
    Bounds,
    attempt,
    blend,
    derivatives,
    follow,
    gains,
    gains_slope,
    measure,
    pack,
    polish,
    squares,
    unpack,
)
from reverie.diffusion.registry import samplers, schedules
from reverie.diffusion.samplers.learned import Recipe, as_recipe
from reverie.diffusion.trajectories import trajectories
from reverie.diffusion.tuning import padded

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_gradients():
    """As in use: nothing is differentiated."""
    with torch.no_grad():
        yield


def some(name, seeds=(0, 1), count=24):
    """Trajectories of some mixtures."""
    schedule = schedules[name]()
    scale = schedule.prior_std(torch.ones(1, dtype=F64))
    x = scale * normal((count * len(seeds), 2), seeds[0], "test polish").double()
    return trajectories(MixtureStack([random_mixture(2, seed, schedule) for seed in seeds]), x)


def usual(name, steps=6):
    schedule = schedules[name]()
    return padded(as_recipe(samplers["unipc"](), schedule, karras(schedule, steps)))


class Plain(Denoiser):
    """A denoiser that does not say how its estimate changes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.schedule = inner, inner.schedule

    def forward(self, x, t, condition=None):
        return self.inner(x, t)


def test_numbers_of_a_recipe_and_back():
    recipe = usual("linear")
    assert unpack(pack(recipe), recipe, Bounds(-100.0, 100.0)) == recipe
    crossed = pack(recipe)
    crossed[3] = 9.0  # the second step's lambda, beyond all others
    lam = unpack(crossed, recipe, Bounds(-6.0, 5.0)).lam
    assert all(b - a >= 0.0199 for a, b in pairwise(lam))
    assert lam[-1] <= 5.0


def later(recipe):
    """That recipe, begun a little before its second step, and keeping more than is usual, then less."""
    kept = tuple(1.1 - 0.05 * k for k in range(recipe.steps - 1))
    return Recipe((recipe.lam[1] - 0.3, *recipe.lam[1:]), recipe.weights, kept)


@pytest.mark.parametrize("begins", ["at t = 1", "later"])
@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "edm", "sub-vp"])
def test_derivatives_are_differences_of_walks(name, begins):
    one, recipe = some(name), usual(name) if begins == "at t = 1" else later(usual(name))
    found, size = derivatives(one, recipe, follow(one, recipe)), 1e-6
    plain = dataclasses.replace(one, denoiser=Plain(one.denoiser))
    torch.testing.assert_close(derivatives(plain, recipe, follow(one, recipe)), found, rtol=1e-3, atol=1e-3)
    for i, value in enumerate(pack(recipe).tolist()):
        if i == 0 and begins == "at t = 1":
            continue  # there is nothing before it
        ends = []
        for sign in (1, -1):
            theta = pack(recipe)
            theta[i] = value + sign * size
            ends.append(follow(one, unpack(theta, recipe, Bounds(-1e9, 1e9))).x[-1])
        want = (ends[0] - ends[1]) / (2 * size)
        torch.testing.assert_close(found[..., i], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-8)


def test_it_is_nearer_also_where_it_was_not_fitted():
    one, other, recipe = some("linear"), some("linear", (50, 51), 200), usual("linear")
    found, value = polish([one], recipe, 12)
    assert value == pytest.approx(measure([one], found, [follow(one, found)]))
    before, after = (squares(other, follow(other, r).x[-1]) for r in (recipe, found))
    assert after.median() < before.median() / 25  # squares: five times as near
    assert after.mean() < before.mean() / 4


def test_it_is_never_worse_and_more_rounds_are_not_either():
    one, recipe = some("cosine"), usual("cosine", 4)
    values = [attempt([one], recipe)[1], *(polish([one], recipe, rounds)[1] for rounds in (1, 3, 6))]
    assert values == sorted(values, reverse=True)
    assert polish([one], recipe, 0)[0] == recipe


def test_a_sample_that_counts_for_nothing_changes_nothing():
    one, recipe = some("linear", (0,), 30), usual("linear", 3)
    share = torch.cat([torch.full((21,), 1 / 21, dtype=F64), torch.zeros(9, dtype=F64)])
    half, alone = dataclasses.replace(one, share=share), one.rows(range(21))
    a, b = (polish([sets], recipe, 3)[0] for sets in (half, alone))
    torch.testing.assert_close(pack(a), pack(b), rtol=1e-6, atol=1e-6)


def test_weights_that_numbers_cannot_hold_are_no_walk():
    one = some("linear")
    wild = Recipe((-5.0, 0.0, 1.0), ((1e200,), (1e200, 0.0), (1e200, 0.0, 0.0)))
    assert attempt([one], wild) is None


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_gains_are_how_the_end_moves_of_one_gaussian(name):
    recipe, schedule = later(usual(name, 5)), schedules[name]()

    def end(errors):
        """Where a sample of a standard Gaussian ends, whose estimates are off by these."""
        x, seen = torch.ones(1, dtype=F64), []
        known = levels(schedule, recipe.grid(schedule).tolist())
        for k, row in enumerate(recipe.weights):
            alpha, sigma = known[k].alpha, known[k].sigma
            seen.append(alpha / (alpha**2 + sigma**2) * x + errors[k])
            keep, gain = recipe.factors(k, known[k], known[k + 1])
            x = keep * x + gain * blend(row, seen)
        return x

    without = end(torch.zeros(5, dtype=F64))
    moved = torch.cat([end(axis) - without for axis in torch.eye(5, dtype=F64)])
    torch.testing.assert_close(gains(recipe), moved, rtol=1e-5, atol=1e-8)
    bounds = Bounds(-100.0, 100.0)
    theta, slope = pack(recipe), gains_slope(recipe, bounds)
    step = 1e-4 * torch.linspace(-1, 1, len(theta), dtype=F64)
    wanted = gains(unpack(theta + step, recipe, bounds)) - gains(unpack(theta - step, recipe, bounds))
    torch.testing.assert_close(2 * slope @ step, wanted, rtol=2e-3, atol=1e-6)


def test_where_errors_of_estimates_count_more_they_are_smaller_in_the_end():
    one, recipe = some("linear", count=48), usual("linear")
    found = [polish([one], recipe, 8, aim=Aim(noise=noise))[0] for noise in (1e-3, 1.0)]
    few, many = (float(gains(r).square().sum()) for r in reversed(found))
    assert few < many / 2
