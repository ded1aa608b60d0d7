"""Solvers with a step left out."""

import pytest

from reverie.base.errors import NonFiniteError
from reverie.diffusion.lengthening import split
from reverie.diffusion.polish import attempt
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.shortening import shortened, without
from reverie.diffusion.walking import Bounds

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_numbers_of_the_step_go_and_its_weights_are_the_next_ones():
    rows = ((1.0,), (1.25, -0.25), (1.5, -0.375, -0.125), (2.0, -1.0, 0.5))
    recipe = Recipe((-4.0, -2.0, 0.0, 2.0), rows, (1.0, 0.75, 1.5))
    assert without(recipe, 0) == Recipe((-2.0, 0.0, 2.0), ((1.0,), (1.5, -0.5), (2.0, -1.0, 0.5)), (0.75, 1.5))
    assert without(recipe, 1) == Recipe((-4.0, 0.0, 2.0), ((1.0,), (1.125, -0.125), (2.0, -0.5)), (1.0, 1.5))
    assert without(recipe, 3) == Recipe((-4.0, -2.0, 0.0), rows[:3], (1.0, 0.75))


def test_a_step_that_was_put_in_is_left_out_again(some, usual):
    one, recipe = some("linear"), usual("linear")
    cut = split(recipe, 2, Bounds.of(one), past=10)
    assert without(cut, 3).lam == recipe.lam
    assert attempt([one], without(cut, 3))[1] == pytest.approx(attempt([one], recipe)[1], abs=1e-6)


def test_what_is_left_is_polished_and_nearer_than_a_published_solver_of_as_many(some, usual):
    one = some("linear")
    found = shortened([one], [[one], [one]], usual("linear", 7), 5, 6)
    assert found.steps == 5
    assert attempt([one], found)[1] < attempt([one], usual("linear", 5))[1] - 2
    assert shortened([one], [[one]], found, 5, 6) is found


def test_where_no_step_can_be_left_out_it_says_so(some):
    one, wild = some("linear"), Recipe((-5.0, 0.0, 1.0), ((1e200,), (1e200, 0.0), (1e200, 0.0, 0.0)))
    with pytest.raises(NonFiniteError, match="any one of its steps"):
        shortened([one], [[one]], wild, 2, 1)
