"""Starts between two ends: that they are found, and that a solver fitted to them ends seldomer on the wrong side."""

import pytest
import torch

from reverie.base.randomness import normal
from reverie.diffusion.oracle_stack import MixtureStack, random_stack
from reverie.diffusion.oracles import Mixture, random_mixture
from reverie.diffusion.polish import follow, polish, squares
from reverie.diffusion.registry import schedules
from reverie.diffusion.starts import LEAST, between, bounded, sensitivity, solved, stages, two_ends
from reverie.diffusion.trajectories import trajectories
from reverie.diffusion.tuning import published

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_gradients():
    """As in use: nothing is differentiated."""
    with torch.no_grad():
        yield


def two_points(schedule):
    """Two narrow modes on a line, of the same weight: the border is x = 0."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64)
    return Mixture(means, torch.full((2,), 0.1, dtype=F64), torch.ones(2, dtype=F64), schedule)


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_what_is_sensitive_lies_at_the_border(name):
    schedule = schedules[name]()
    scale = float(schedule.prior_std(torch.ones(1, dtype=F64)))
    x = scale * normal((2000, 2), 0, "test starts").double()
    s = sensitivity(two_points(schedule), x)
    near, far = x[:, 0].abs() < 0.02 * scale, x[:, 0].abs() > 0.5 * scale
    assert s[near].median() > 10 * s[far].median()
    drawn = between(s, 100, seed=1)
    assert len(set(drawn.tolist())) == 100
    assert x[drawn, 0].abs().median() < x[:, 0].abs().median() / 2


def test_of_each_group_as_many_are_drawn_and_the_seed_decides():
    s = torch.rand(300, dtype=F64, generator=torch.Generator().manual_seed(0))
    rows = between(s, 5, seed=2, groups=3)
    assert [int((rows // 100 == group).sum()) for group in range(3)] == [5, 5, 5]
    assert torch.equal(rows, between(s, 5, seed=2, groups=3))
    assert not torch.equal(rows, between(s, 5, seed=3, groups=3))


def test_sensitivities_are_in_units_of_the_middle_one_and_none_is_nothing():
    assert bounded(torch.tensor([0.0, 1.0, 2.0, 4.0, 40.0], dtype=F64)).tolist() == [LEAST, 0.5, 1.0, 2.0, 20.0]
    assert bounded(torch.zeros(3, dtype=F64)).tolist() == [LEAST] * 3  # of a model that sends all to one point


def test_two_ends_are_those_of_the_trajectories_and_errors_are_divided():
    schedule = schedules["linear"]()
    oracle, x = random_mixture(2, 1, schedule), normal((6, 2), 0, "test starts").double()
    whole, scale = trajectories(oracle, x, 64), torch.tensor([1.0, 2, 4, 1, 1, 1], dtype=F64)
    ends = two_ends(oracle, x, scale, 64)
    assert torch.equal(ends.end, whole.end)
    assert torch.equal(ends.end, solved(oracle, x, 64))
    assert [level.lam for level in ends.known] == [level.lam for level in whole.known]
    wrong = whole.end + 1
    assert squares(ends, wrong).tolist() == pytest.approx([1, 0.25, 0.0625, 1, 1, 1])
    assert squares(ends.rows([2, 0]), wrong[[2, 0]]).tolist() == pytest.approx([0.0625, 1])


def test_each_stage_has_its_own_even_starts_and_as_many_between_two_ends():
    stack, x = random_stack(16, (1, 2), 300, schedules["linear"](), "test starts")
    found = stages(stack, x, 2, 16, [20, 10], 32)
    rows = x.reshape(2, 300, -1)
    for (even, border), first, count in zip(found, (0, 20), (20, 10), strict=True):
        assert torch.equal(even.x[0], rows[:, first : first + count].flatten(0, 1))
        assert torch.equal(even.end, solved(stack, even.x[0], 32))
        assert border.x.shape == even.x.shape
        assert even.scale.tolist() == [1.0] * (2 * count)
        assert border.scale.median() > 3  # in units of the middle sensitivity of all
        for part in border.x[0].chunk(2):
            assert len(torch.unique(part, dim=0)) == count
        assert (even.numbers, border.numbers) == (16, 16)


def test_polished_on_them_as_well_a_solver_errs_less_between_two_ends():
    """By 8 evaluations in 64 dimensions, as many starts in all: less than half of the error over the sensitivity."""
    schedule = schedules["linear"]()
    drawn = [normal((2000, 64), 0, "test starts", part).double() for part in (0, 1)]
    (mixture, pool), (_, other) = (random_mixture(64, 4, schedule).folded(x) for x in drawn)
    stack = MixtureStack([mixture])

    def ends(x, count, seed):
        s = sensitivity(stack, x)
        rows = between(s, count, seed)
        return two_ends(stack, x[rows], bounded(s)[rows], 64, 64)

    even, more = (two_ends(stack, pool[:count], steps=64, numbers=64) for count in (64, 128))
    first, unseen, found = published([even], 8)[1], ends(other, 200, 1), {}
    for word, sets in {"even": [more], "both": [even, ends(pool, 64, 0)]}.items():
        recipe, _ = polish(sets, first, 8)
        found[word] = squares(unseen, follow(unseen, recipe).x[-1]).median().sqrt().item()
    assert found["both"] < found["even"] / 2
