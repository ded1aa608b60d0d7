"""Solvers with a step in two do what they did."""

import pytest
import torch

from reverie.diffusion.lengthening import lengthened, split
from reverie.diffusion.polish import Aim, measure
from reverie.diffusion.recipes import general
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.walking import Bounds, follow

pytestmark = pytest.mark.usefixtures("no_gradients")
EXACT = Aim(noise=0.0)


def uneven(recipe):
    """That recipe, keeping more than is usual, then less."""
    return Recipe(recipe.lam, recipe.weights, tuple(1.2 - 0.1 * k for k in range(recipe.steps - 1)))


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("k", range(5))
def test_a_step_in_two_is_the_same_step(name, k, some):
    one, recipe = some(name), uneven(general(schedules[name](), 5, 64))
    longer = split(recipe, k, Bounds.of(one), past=10)
    assert longer.steps == 6
    torch.testing.assert_close(follow(one, longer).x[-1], follow(one, recipe).x[-1], rtol=0, atol=1e-10)


def test_more_steps_do_no_harm_where_their_past_has_room(some):
    one, recipe = some("linear"), uneven(general(schedules["linear"](), 4, 64))
    longer = lengthened([one], recipe, 9, past=9, aim=EXACT)
    values = [measure([one], r, [follow(one, r)], aim=EXACT) for r in (recipe, longer)]
    assert longer.steps == 9
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    assert lengthened([one], recipe, 4, past=4, aim=EXACT) is recipe


def test_older_estimates_are_left_out(some):
    one, recipe = some("linear"), general(schedules["linear"](), 6, 64)
    longer = lengthened([one], recipe, 8, past=2, aim=EXACT)
    assert max(map(len, longer.weights)) == 3


def test_a_step_too_short_is_not_cut():
    recipe = Recipe((-3.0, -2.95, 1.0), ((1.0,), (1.0,), (1.0,)))
    assert [split(recipe, k, Bounds(-4.0, 1.05), past=2) is None for k in range(3)] == [True, False, True]


def test_where_no_step_can_be_cut_there_is_none(some):
    one = some("linear")
    most = Bounds.of(one).most
    assert lengthened([one], Recipe((most - 0.02, most), ((1.0,), (1.0,))), 3) is None
