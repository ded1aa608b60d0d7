"""Leaps: chosen by other starts, never worse there, the same by the same seed."""

import dataclasses

import pytest
import torch

from reverie.base.randomness import generator
from reverie.diffusion.hopping import Jury, hopped, leapt
from reverie.diffusion.oracle_stack import random_stack
from reverie.diffusion.polish import squares
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.starts import two_ends
from reverie.diffusion.tuning import published
from reverie.diffusion.walking import Bounds, follow, pack

pytestmark = pytest.mark.usefixtures("no_gradients")


def some(purpose, name="linear"):
    """The ends of trajectories of two mixtures."""
    return two_ends(*random_stack(16, (0, 1), 60, schedules[name](), purpose), steps=48, numbers=16)


def jury(name="linear"):
    """Starts to choose by, of which those that count as if they were beside borders count unevenly."""
    beside = some("beside", name)
    share = torch.linspace(1, 2, len(beside.end), dtype=torch.float64)
    return Jury(some("choose", name), dataclasses.replace(beside, share=share / share.sum()))


def test_the_error_is_the_typical_one_of_the_even_and_the_mean_of_those_beside_borders():
    judges, recipe = jury(), published([some("fit")], 5)[0]
    even, beside = (squares(one, follow(one, recipe).x[-1]) for one in (judges.even, judges.beside))
    typical, mean = even.log().mean().item(), (judges.beside.share * beside).sum().log().item()
    for weight in (0.0, 0.3, 1.0):
        found = dataclasses.replace(judges, mean=weight).error(recipe)
        assert found == pytest.approx((1 - weight) * typical + weight * mean, abs=1e-6)


def test_it_is_better_by_other_starts_with_every_leap_or_as_it_was():
    fitting, others = [[some("fit")]], jury()
    first = published(fitting[0], 5)[1]
    found = [hopped(first, fitting, others, hops, 4) for hops in (0, 2, 6)]
    assert found[0] is first
    errors = [others.error(one) for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] - 2  # a logarithm of squares: e times as near
    assert hopped(first, fitting, others, 2, 4) == found[1]


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_a_leap_moves_all_numbers_and_keeps_them_in_order(name):
    one = some("fit", name)
    recipe, bounds = published([one], 6)[0], Bounds.of(one)
    there = leapt(recipe, 0.2, bounds, generator(0, "test hopping"))
    assert there != recipe
    assert all(b > a for a, b in zip(there.lam, there.lam[1:], strict=False))
    assert there.lam[-1] <= bounds.most
    kept = [0, *(i for i, value in enumerate(pack(recipe).tolist()) if value == 1.0)]
    moved = (pack(there) - pack(recipe)).abs() > 1e-6
    assert int((~moved).sum()) <= len(kept)
    assert there.kept == recipe.kept


def test_what_numbers_cannot_hold_is_worth_nothing():
    wild = Recipe((-5.0, 0.0, 1.0), ((1e200,), (1e200, 0.0), (1e200, 0.0, 0.0)))
    assert jury().error(wild) == float("inf")
