"""The parts of a run, and what a resumed run may change."""

import pytest

from reverie.base.errors import ModelFileError, UsageError
from reverie.diffusion.objectives import Hybrid, Simple, Variational
from reverie.diffusion.schedules import VP, linear
from reverie.diffusion.times import ImportanceTimes, LogNormalTimes, UniformTimes
from reverie.training.config import TrainConfig
from reverie.training.setup import importance_bins, make_objective, make_times, merge


@pytest.fixture
def run(tmp_path):
    config = TrainConfig(out=str(tmp_path), steps=10, learning_rate=1e-3)
    (tmp_path / "config.json").write_text(config.model_dump_json(exclude_unset=True))
    return tmp_path


def test_what_was_said_then_stays(run):
    merged, changes = merge(TrainConfig(out=str(run)), run)
    assert (merged.steps, merged.learning_rate, changes) == (10, 1e-3, [])


def test_a_new_learning_rate_is_taken_and_said(run):
    merged, changes = merge(TrainConfig(out=str(run), learning_rate=5e-4, steps=20), run)
    assert (merged.steps, merged.learning_rate) == (20, 5e-4)
    assert changes == ["steps: 20, was 10", "learning_rate: 0.0005, was 0.001"]


def test_what_would_make_it_another_run_is_refused(run):
    with pytest.raises(ModelFileError, match=r"widths is None there, \(8, 8\) here; batch_size is 32 there, 64 here"):
        merge(TrainConfig(out=str(run), widths=(8, 8), batch_size=64), run)


def test_changes_that_contradict_what_was_said_are_refused(run):
    (run / "config.json").write_text(
        TrainConfig(out=str(run), steps=10, decay="cosine").model_dump_json(exclude_unset=True)
    )
    with pytest.raises(UsageError, match="needs steps"):
        merge(TrainConfig(out=str(run), steps=None), run)


@pytest.mark.parametrize("content", ["{", "[]", '{"nonsense": 1, "out": "x"}', "null"])
def test_a_damaged_configuration_is_named(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"config\.json is no configuration"):
        merge(TrainConfig(out=str(run)), run)


def test_objectives_and_times_by_name():
    assert isinstance(make_objective(TrainConfig(out="x")), Simple)
    assert isinstance(make_objective(TrainConfig(out="x", objective="hybrid", learned_variance=True)), Hybrid)
    assert isinstance(make_objective(TrainConfig(out="x", objective="vlb")), Variational)
    kinds = {"uniform": UniformTimes, "log-normal": LogNormalTimes, "importance": ImportanceTimes}
    for name, kind in kinds.items():
        assert isinstance(make_times(TrainConfig(out="x", times=name), linear()), kind)


def test_importance_bins_divide_the_table():
    assert importance_bins(linear(1000)) == 100
    assert importance_bins(linear(250)) == 50
    assert importance_bins(linear(97)) == 97
    assert importance_bins(VP()) == 100
