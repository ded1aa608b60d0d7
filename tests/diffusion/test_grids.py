"""Grids: for every spacing, schedule and number of steps, N intervals from the noise to 0, on the trained range."""

import math

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.base.errors import UsageError
from reverie.diffusion import grids as module
from reverie.diffusion.registry import grids
from reverie.diffusion.schedules import EDM, VE, Flow, Table, table

F64 = torch.float64


def counts(schedule):
    most = schedule.timesteps if isinstance(schedule, Table) else 1000
    return [n for n in (1, 2, 3, 4, 5, 7, 8, 10, 13, 20, 49, 50, 99, 100, 333, 500, 501, 999, 1000) if n <= most]


@pytest.mark.parametrize("name", grids)
def test_every_grid_has_its_length_its_ends_and_its_order(schedule, name):
    for steps in counts(schedule):
        grid = grids[name](schedule, steps)
        assert grid.dtype == F64
        assert grid.shape == (steps + 1,)
        assert bool((grid.diff() < 0).all())
        assert grid[-1] == 0
        if name != "leading":
            assert grid[0] == 1
        if name == "leading" or (name not in ("trailing", "angle") and steps > 1):
            assert grid[-2] == schedule.t_min
        assert bool((grid[:-1] >= schedule.t_min).all()) or (name == "trailing" and not isinstance(schedule, Table))
        if isinstance(schedule, Table) and name in ("leading", "trailing", "linspace"):
            timesteps = schedule.timestep(grid[:-1])
            assert torch.equal(timesteps, timesteps.round())


@given(st.integers(2, 400), st.floats(0, 1))
def test_every_number_of_steps_on_every_length_of_table(entries, share):
    schedule, steps = table("linear", entries), 1 + round(share * (entries - 1))
    for name in ("leading", "trailing", "linspace"):
        timesteps = schedule.timestep(grids[name](schedule, steps)[:-1])
        assert len(timesteps) == steps
        assert torch.equal(timesteps, timesteps.round())
        assert bool((timesteps.diff() < 0).all())
        assert 0 <= timesteps[-1] <= timesteps[0] <= entries - 1
        assert name == "leading" or timesteps[0] == entries - 1
        assert name == "trailing" or steps == 1 or timesteps[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 5, 7, 8, 10, 20, 25, 50, 100, 250, 333, 500, 1000])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    schedule = table("linear")
    ours = schedule.timestep(grids[spacing](schedule, steps)[:-1])
    assert ours.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_an_offset_is_diffusers(steps):
    theirs = diffusers.DDIMScheduler(steps_offset=1)
    theirs.set_timesteps(steps)
    schedule = table("linear")
    assert schedule.timestep(module.leading(schedule, steps, 1)[:-1]).tolist() == theirs.timesteps.tolist()


def test_an_offset_may_not_leave_the_table():
    """diffusers indexes past its table there."""
    with pytest.raises(UsageError, match="offset 1 takes 1000 leading steps to timestep 1000, off the table of 1000"):
        module.leading(table("linear"), 1000, 1)
    with pytest.raises(UsageError, match="offset -1"):
        module.leading(table("linear"), 10, -1)
    assert module.leading(table("linear"), 500, 1)[0] == 1


def test_an_offset_of_a_schedule_without_timesteps_is_refused_not_ignored():
    with pytest.raises(UsageError, match="offset is 1"):
        module.leading(Flow(), 10, 1)


@pytest.mark.parametrize("name", grids)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(name, steps):
    with pytest.raises(UsageError, match=rf"steps is {steps}; it must lie in 1..1000"):
        grids[name](table("linear"), steps)
    if steps < 1:
        with pytest.raises(UsageError, match=f"steps is {steps}"):
            grids[name](Flow(), steps)


@pytest.mark.parametrize(("steps", "rho"), [(18, 7.0), (2, 7.0), (40, 3.0)])
def test_karras_is_edms_equation_5(steps, rho):
    schedule = EDM(0.002, 80.0)
    got = schedule.sigma(module.karras(schedule, steps, rho))
    low, high = 0.002 ** (1 / rho), 80 ** (1 / rho)
    want = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=1e-10, atol=0)


def test_karras_levels_are_even_in_their_root_on_every_schedule(schedule):
    if isinstance(schedule, Table) and schedule.timesteps < 20:
        return
    t = module.karras(schedule, 20)[1:-1]
    root = (-schedule.log_snr(t) / 14).exp()
    assert root.diff().std() < 1e-6 * root.diff().abs().mean()


def test_log_snr_is_even_on_every_schedule(schedule):
    if isinstance(schedule, Table) and schedule.timesteps < 20:
        return
    log_snr = schedule.log_snr(module.uniform_log_snr(schedule, 20)[1:-1])
    assert log_snr.diff().std() < 1e-6 * log_snr.diff().mean()


def test_leading_spans_a_schedule_whose_first_time_is_late():
    grid = module.leading(VE(), 50)
    assert grid[0] < 1
    assert grid[-2] == VE().t_min


def test_any_list_of_times():
    assert module.from_times([0.9, 0.4]).tolist() == [0.9, 0.4, 0]
    assert module.from_times([1.0, 0.4, 0.0]).tolist() == [1, 0.4, 0]
    schedule = table("linear", 10)
    assert module.from_timesteps(schedule, [9, 4, 0]).tolist() == [1, 0.5, 0.1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: module.from_times([]), "at least one time"),
        (lambda: module.from_times([0.0]), "at least one time"),
        (lambda: module.from_times([0.0, 1.0]), "number 0 is 0 and the next 1"),
        (lambda: module.from_times([0.4, 0.9]), "number 0 is 0.4 and the next 0.9"),
        (lambda: module.from_times([0.9, 0.4, 0.4]), "number 1 is 0.4 and the next 0.4"),
        (lambda: module.from_times([1.5, 0.4]), "the first of these is 1.5"),
        (lambda: module.from_times([math.nan]), "the first of these is nan"),
        (lambda: module.from_times([0.9, math.nan]), "the next nan"),
        (lambda: module.from_times([0.9, -0.1]), "number 1 is -0.1 and the next 0"),
        (lambda: module.from_timesteps(table("linear", 10), [10, 4]), r"0..9; these are \[10, 4\]"),
        (lambda: module.from_timesteps(table("linear", 10), [4, -1]), r"0..9"),
        (lambda: module.from_timesteps(table("linear", 10), [4, 4]), "number 0 is 0.5"),
        (lambda: module.from_timesteps(Flow(), [4, 3]), "needs a schedule that is a table"),
        (lambda: module.karras(Flow(), 5, rho=0.0), "rho is 0.0"),
        (lambda: grids["trailling"], "did you mean trailing"),
    ],
)
def test_what_is_no_grid_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
