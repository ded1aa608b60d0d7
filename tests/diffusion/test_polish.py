"""Polishing: its derivatives against differences of whole walks, and that it does what it is for."""

import dataclasses

import pytest
import torch

from reverie.diffusion.levels import levels
from reverie.diffusion.polish import (
    Aim,
    Bounds,
    attempt,
    blend,
    follow,
    gains,
    gains_slope,
    measure,
    of_lambdas,
    pack,
    polish,
    squares,
    unpack,
    within,
)
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import Recipe

F64 = torch.float64


pytestmark = pytest.mark.usefixtures("no_gradients")


def test_it_is_nearer_also_where_it_was_not_fitted(some, usual):
    one, other, recipe = some("linear"), some("linear", (50, 51), 200), usual("linear")
    found, value = polish([one], recipe, 12)
    assert value == pytest.approx(measure([one], found, [follow(one, found)]))
    before, after = (squares(other, follow(other, r).x[-1]) for r in (recipe, found))
    assert after.median() < before.median() / 25  # squares: five times as near
    assert after.mean() < before.mean() / 4


def test_it_is_never_worse_and_more_rounds_are_not_either(some, usual):
    one, recipe = some("cosine"), usual("cosine", 4)
    values = [attempt([one], recipe)[1], *(polish([one], recipe, rounds)[1] for rounds in (1, 3, 6))]
    assert values == sorted(values, reverse=True)
    assert polish([one], recipe, 0)[0] == recipe


def test_a_sample_that_counts_for_nothing_changes_nothing(some, usual):
    one, recipe = some("linear", (0,), 30), usual("linear", 3)
    share = torch.cat([torch.full((21,), 1 / 21, dtype=F64), torch.zeros(9, dtype=F64)])
    half, alone = dataclasses.replace(one, share=share), one.rows(range(21))
    a, b = (polish([sets], recipe, 3)[0] for sets in (half, alone))
    torch.testing.assert_close(pack(a), pack(b), rtol=1e-6, atol=1e-6)


def test_weights_that_numbers_cannot_hold_are_no_walk(some):
    one = some("linear")
    wild = Recipe((-5.0, 0.0, 1.0), ((1e200,), (1e200, 0.0), (1e200, 0.0, 0.0)))
    assert attempt([one], wild) is None


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_gains_are_how_the_end_moves_of_one_gaussian(name, later):
    recipe, schedule = later(name, 5), schedules[name]()

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


def test_where_errors_of_estimates_count_more_they_are_smaller_in_the_end(some, usual):
    one, recipe = some("linear", count=48), usual("linear")
    found = [polish([one], recipe, 8, aim=Aim(noise=noise))[0] for noise in (1e-3, 1.0)]
    few, many = (float(gains(r).square().sum()) for r in reversed(found))
    assert few < many / 2


def test_lambdas_that_would_come_too_near_move_alike_and_those_at_the_bounds_stay():
    """The least of a parabola around numbers whose lambdas are out of order, or beyond the bounds."""
    recipe = Recipe((-3.0, -1.0, 0.0, 2.0), ((1.0,), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)))
    theta, places, bounds = pack(recipe), of_lambdas(recipe), Bounds(-3.0, 2.0)
    want = theta.clone()
    want[places] = torch.tensor([-4.0, 0.5, -0.5, 3.0], dtype=F64)
    want[1] = 7.0
    found = theta - within(torch.eye(len(theta), dtype=F64), theta - want, recipe, bounds)
    assert found[places].tolist() == pytest.approx([-3.0, -0.5, 0.5, 2.0])  # the middle ones by the mean of both
    assert found[1] == pytest.approx(7.0)
    inside = want.clone()
    inside[places] = torch.tensor([-2.9, 0.5, 0.6, 1.9], dtype=F64)
    found = theta - within(torch.eye(len(theta), dtype=F64), theta - inside, recipe, bounds)
    torch.testing.assert_close(found, inside)
