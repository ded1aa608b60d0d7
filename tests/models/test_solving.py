"""Grids that are asked for."""

import math

import pytest
import torch

from reverie.base.errors import UsageError


def test_a_grid_may_be_times_or_timesteps(model):
    assert model.plan(1, grid=[1.0, 0.5, 0.25]).grid.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert model.plan(1, grid=torch.tensor([1.0, 0.5])).steps == 2
    assert model.plan(1, grid=[39, 19]).grid.tolist() == [1.0, 0.5, 0.0]
    assert model.plan(1, grid=[39, 19], steps=2).steps == 2
    model.sample(1, grid=[1.0, 0.3])


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([0.5, 1.0], "times decrease to 0"),
        ([], "holds no times"),
        ([40, 3], r"must lie in 0\.\.39"),
        ([1.0, math.nan], "a time is nan"),
    ],
)
def test_a_grid_that_is_none_is_refused(model, grid, words):
    with pytest.raises(UsageError, match=words):
        model.plan(1, grid=grid)
