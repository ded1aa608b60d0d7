"""Starts at borders: that they are found, and that a solver fitted to them ends seldomer on the wrong side."""

import pytest
import torch

from reverie.base.randomness import normal
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.oracle_stack import random_circles, random_stack
from reverie.diffusion.oracles import Mixture, random_mixture
from reverie.diffusion.polish import Aim, judged, polish, squares
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import as_recipe
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.starts import (
    BESIDE,
    BORDER,
    LEAST,
    at_borders,
    beside_borders,
    bounded,
    circles,
    sensitivity,
    solved,
    stages,
    two_ends,
)
from reverie.diffusion.trajectories import trajectories
from reverie.diffusion.tuning import published
from reverie.diffusion.walking import follow

F64 = torch.float64


pytestmark = pytest.mark.usefixtures("no_gradients")


def two_points(schedule):
    """Two narrow modes on a line, of the same weight: the border is x = 0."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64)
    return Mixture(means, torch.full((2,), 0.1, dtype=F64), torch.ones(2, dtype=F64), schedule)


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_what_is_sensitive_lies_at_the_border(name):
    schedule = schedules[name]()
    scale = float(schedule.prior_std(torch.ones(1, dtype=F64)))
    x = scale * normal((2000, 2), 0, "test starts").double()
    s = sensitivity(two_points(schedule), x, 8)
    near, far = x[:, 0].abs() < 0.02 * scale, x[:, 0].abs() > 0.5 * scale
    assert s[near].median() > 10 * s[far].median()


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_each_circle_that_crosses_the_border_is_followed_to_it(name):
    schedule = schedules[name]()
    scale = float(schedule.prior_std(torch.ones(1, dtype=F64)))
    x, y = (scale * normal((60, 2), seed, "test starts").double() for seed in (0, 1))
    crossed = x[:, 0] * y[:, 0] < 0
    most = (
        0.5 * torch.pi * 0.5 ** torch.tensor([3.0, 6.0], dtype=F64).repeat(30) * (x.square() + y.square()).sum(1).sqrt()
    )
    found = at_borders(two_points(schedule), circles(x, y), 60, (3, 6), 16, seed=1)
    assert 20 < crossed.sum() < 40
    assert (found[crossed, 0].abs() < most[crossed]).all()
    assert torch.equal(found, at_borders(two_points(schedule), circles(x, y), 60, (3, 6), 16, seed=1))
    assert not torch.equal(found, at_borders(two_points(schedule), circles(x, y), 60, (3, 6), 16, seed=2))


def test_circles_of_noise_are_noise():
    x, y = (normal((4000, 3), seed, "test starts") for seed in (0, 1))
    angle = torch.linspace(0, 1.5, 4000, dtype=F64)
    turned = circles(x, y)(angle)
    assert turned.dtype == x.dtype
    torch.testing.assert_close(turned[[0]], x[[0]])
    torch.testing.assert_close(turned.mT @ turned / 4000, torch.eye(3), rtol=0, atol=5 * (2 / 4000) ** 0.5)


def test_folded_circles_are_the_folded_starts_of_circles():
    schedule = schedules["linear"]()
    around = random_circles(64, (3, 4), 5, schedule, "test starts")
    angle = torch.linspace(0, 1, 10, dtype=F64)
    x, y = (normal((5, 64), 4, f"test starts, {end}").double() for end in "xy")
    _, second = random_mixture(64, 4, schedule).folded(circles(x, y)(angle[5:]))
    torch.testing.assert_close(around(angle)[5:], second)


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


def test_each_stage_has_its_own_starts_and_as_many_at_borders():
    drawn = 16, (1, 2), 30, schedules["linear"](), "test starts"
    (stack, x), around = random_stack(*drawn), random_circles(*drawn)
    found = stages(stack, x, around, 2, 16, [20, 10], 32)
    rows = x.reshape(2, 30, -1)
    for (even, border), first, count in zip(found, (0, 20), (20, 10), strict=True):
        assert torch.equal(even.x[0], rows[:, first : first + count].flatten(0, 1))
        assert torch.equal(even.end, solved(stack, even.x[0], 32))
        assert border.x.shape == even.x.shape
        assert even.scale.tolist() == [1.0] * (2 * count)
        assert sensitivity(stack, border.x[0]).median() > 3 * sensitivity(stack, even.x[0]).median()
        assert border.scale.std() > 0.5
        assert (even.numbers, border.numbers, even.part, border.part) == (16, 16, 1, BORDER)
    assert len(torch.unique(torch.cat([border.x[0] for _, border in found]), dim=0)) == 60


def test_polished_on_them_as_well_a_solver_ends_seldomer_on_the_wrong_side():
    """By 8 evaluations in 64 dimensions, as many starts in all, at other borders: fewer by a quarter."""
    what = [
        (64, (4,), count, schedules["linear"](), purpose)
        for count, purpose in ((128, "fit"), (64, "fit"), (500, "judge"))
    ]
    (stack, x), around, other = random_stack(*what[0]), random_circles(*what[1]), random_circles(*what[2])
    near = at_borders(stack, around, 64)
    border = two_ends(stack, near, bounded(sensitivity(stack, near)), 64, 64)
    even, more = (two_ends(stack, x[:count], steps=64, numbers=64) for count in (64, 128))
    first = judged([even, border], published([even], 8))[0][0]
    unseen, wrong = two_ends(stack, at_borders(stack, other, 500), None, 64, 64), {}
    for word, sets in {"even": [more], "both": [even, border]}.items():
        recipe, _ = polish(sets, first, 20, aim=Aim(mean=0.9))
        wrong[word] = int((squares(unseen, follow(unseen, recipe).x[-1]) > 0.1).sum())
    assert wrong["even"] > 40
    assert wrong["both"] < 0.75 * wrong["even"]


def test_starts_beside_borders_lie_on_either_side_as_many_for_each_power_of_ten():
    """Two modes on a line: the border is x = 0, and an angle beside it the arc sine of x, of noise of norm 1."""
    schedule, count = schedules["linear"](), 400
    angle = torch.linspace(0.1, 1.4, count, dtype=F64)
    x, y = torch.stack([angle.cos(), angle.sin()], 1), torch.stack([-angle.sin(), angle.cos()], 1)
    found = beside_borders(two_points(schedule), circles(x, y), count, 2)
    off = found.x[0][:, 0].asin()
    assert 170 < (off > 0).sum() < 230  # within 3 standard deviations
    away = off.abs().sort().values.log10()
    least, most = (torch.tensor(value, dtype=F64).log10() for value in BESIDE)
    even = least + (most - least) * (torch.arange(count, dtype=F64) + 0.5) / count
    torch.testing.assert_close(away[50:], even[50:], rtol=0, atol=0.1)  # nearer ones by how well the border is known
    torch.testing.assert_close(found.share, off.abs() / off.abs().sum(), rtol=0, atol=1e-5)


def test_a_few_starts_beside_borders_say_the_mean_square_error_of_many():
    """By 10 and by 20 steps in 16 dimensions: the ratio of the two, by 600 starts beside borders and 60,000 others."""
    schedule = schedules["linear"]()
    stack, x = random_stack(16, (3,), 60_000, schedule, "many")
    truth, many = two_ends(stack, x, steps=200, numbers=16), []
    few, said = beside_borders(stack, random_circles(16, (3,), 600, schedule, "few"), 600, 16, 200), []
    for steps in (10, 20):
        recipe = as_recipe(UniPC(), schedule, uniform_log_snr(schedule, steps))
        for one, values in ((truth, many), (few, said)):
            errors = squares(one, follow(one, recipe).x[-1])
            values.append(float((one.share * errors).sum()))
    assert many[0] / many[1] > 3
    assert said[0] / said[1] == pytest.approx(many[0] / many[1], rel=0.4)


def test_where_many_steps_are_taken_borders_are_nearer():
    drawn = 16, (1, 2), 32, schedules["linear"](), "test starts"
    (stack, x), around = random_stack(*drawn), random_circles(*drawn)
    few, many = (stages(stack, x, around, 2, 16, [32], 32, many)[0][1] for many in (False, True))
    assert sensitivity(stack, many.x[0], 64).log().mean() > sensitivity(stack, few.x[0], 64).log().mean()
