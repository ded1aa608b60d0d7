"""A whole run: resumed, stopped, poisoned, without a disk. The numbers must come out bit for bit."""

import errno
import io
import json
import os
import signal

import pytest
import torch

from reverie.base import storage
from reverie.base.errors import ModelFileError, NonFiniteError, Stopped, StorageError, UsageError
from reverie.data import open_dataset
from reverie.data.batches import Batches
from reverie.models.checkpoints import CheckpointStore
from reverie.models.load import load
from reverie.training import plan, run
from reverie.training.config import TrainConfig
from reverie.training.trainer import Run, train

QUICK = {
    "widths": (8, 8), "layers": 1, "batch_size": 8, "save_every": 3, "sample_every": 0, "validate_every": 4,
    "log_every": 2, "limit": 60, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def quick(folder, **settings) -> TrainConfig:
    return TrainConfig(out=str(folder), **(QUICK | settings))


def go(folder, resume="no", **settings):
    report = io.StringIO()
    train(quick(folder, **settings), resume, report)
    return report.getvalue()


def again(folder, **settings):
    """Resume, saying nothing but what is given."""
    report = io.StringIO()
    train(TrainConfig(out=str(folder), **settings), "yes", report)
    return report.getvalue()


def state(folder):
    """The newest checkpoint's tensors, by group and name."""
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    return checkpoint.step, {
        (group, name): value for group in checkpoint.groups for name, value in checkpoint.tensors(group).items()
    }


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], key, line[key]) for line in lines for key in ("loss", "held_out_loss") if key in line]


def assert_same(one, other):
    (step, tensors), (other_step, others) = state(one), state(other)
    assert step == other_step
    assert tensors.keys() == others.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []


EVERYTHING = {"accumulate": 2, "dropout": 0.2, "ema": (0.9, 0.99), "flip": True, "times": "importance", "timesteps": 10}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings):
    """9 steps at once; 4 + 5; and three resumes in an epoch, by 2 threads: weights, averages, moments, losses."""
    go(tmp_path / "whole", steps=9, **settings)
    go(tmp_path / "twice", steps=4, **settings)
    again(tmp_path / "twice", steps=9)
    go(tmp_path / "often", steps=2, workers=2, **settings)
    for steps in (3, 5, 9):
        again(tmp_path / "often", steps=steps)
    for name in ("twice", "often"):
        assert_same(tmp_path / "whole", tmp_path / name)
    whole = [entry for entry in losses(tmp_path / "whole") if entry[1] == "loss"]
    assert [entry for entry in losses(tmp_path / "twice") if entry[1] == "loss"] == whole


def test_without_the_data_position_it_is_not(tmp_path, monkeypatch):
    """The comparison above can fail: drop the data position, and it does."""
    go(tmp_path / "whole", steps=8)
    go(tmp_path / "lost", steps=4)
    stream = Batches.stream
    monkeypatch.setattr(Batches, "stream", lambda self, start: stream(self, 0))
    again(tmp_path / "lost", steps=8)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "lost")


def test_the_run_can_be_loaded_and_says_what_it_is(tmp_path):
    report = go(tmp_path / "run", steps=4)
    assert "1797" not in report
    assert "60 images of 8x8 grey, 10 classes" in report
    model = load(tmp_path / "run")
    assert model.card.classes == tuple(str(digit) for digit in range(10))
    finished = load(tmp_path / "run" / "model")
    assert finished.digest == model.digest
    assert finished.card.training.steps == 4
    assert finished.card.training.images == 32


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    go(tmp_path / "run", steps=1)
    with pytest.raises(UsageError, match="holds a run already; continue it with --resume"):
        go(tmp_path / "run", steps=1)
    with pytest.raises(UsageError, match="no run to resume"):
        go(tmp_path / "other", "yes", steps=1)
    assert not (tmp_path / "other").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("all my work")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        go(tmp_path / "full", steps=1)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    "settings", [{"data": "nowhere"}, {"schedule": "flow", "prediction": "eps"}, {"device": "tpu9"}]
)
def test_a_refused_run_makes_nothing(tmp_path, settings):
    with pytest.raises(UsageError):
        go(tmp_path / "run", steps=1, **settings)
    assert list(tmp_path.iterdir()) == []


def test_auto_starts_and_then_continues(tmp_path):
    go(tmp_path / "run", "auto", steps=2)
    assert "resuming" in go(tmp_path / "run", "auto", steps=4)
    assert state(tmp_path / "run")[0] == 4


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    go(tmp_path / "run", steps=4)
    before, lines = state(tmp_path / "run"), losses(tmp_path / "run")
    again(tmp_path / "run")
    assert losses(tmp_path / "run") == lines
    assert state(tmp_path / "run")[0] == before[0]


# What a resumed run may not be ----------------------------------------------------------------


def test_another_width_is_refused(tmp_path):
    go(tmp_path / "run", steps=2)
    with pytest.raises(ModelFileError, match="another run: widths"):
        again(tmp_path / "run", widths=(16, 8))


def test_changed_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    images = open_dataset("digits").images(range(30)).squeeze(1).numpy()
    import numpy as np

    np.savez(tmp_path / "data.npz", images=images)
    go(tmp_path / "run", steps=2, data=str(tmp_path / "data.npz"), limit=None)
    np.savez(tmp_path / "data.npz", images=255 - images)
    with pytest.raises(ModelFileError, match="was trained on"):
        again(tmp_path / "run", steps=4)


def test_a_new_learning_rate_is_taken_and_said(tmp_path):
    go(tmp_path / "run", steps=2)
    assert "learning_rate: 0.0005" in again(tmp_path / "run", steps=4, learning_rate=5e-4)


def test_the_arithmetic_that_the_machine_chose_is_kept_on_another(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "fast_bfloat16", lambda device: True)
    assert "dtype: bfloat16, as --dtype is auto" in go(tmp_path / "run", steps=2, dtype="auto")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(plan, "fast_bfloat16", lambda device: False)
    assert "; bfloat16 on cpu" in again(tmp_path / "run", steps=3)


def test_a_missing_average_is_not_begun_anew(tmp_path):
    go(tmp_path / "run", steps=4)
    for path in (tmp_path / "run" / "checkpoints").glob("*/ema-0.999.safetensors"):
        path.unlink()
    with pytest.raises(ModelFileError, match=r"ema-0\.999"):
        again(tmp_path / "run", steps=6)


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path):
    go(tmp_path / "whole", steps=8)
    go(tmp_path / "run", steps=5)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-5] ^= 4
    (newest / "model.safetensors").write_bytes(weights)
    report = again(tmp_path / "run", steps=8)
    assert newest.name in report
    assert "resuming" in report
    assert_same(tmp_path / "whole", tmp_path / "run")


# Numbers that are none ------------------------------------------------------------------------


def poison(monkeypatch, steps, value=float("nan")):
    """Make the images of some steps not finite."""
    examples = Run.examples

    def poisoned(self, batch):
        made = examples(self, batch)
        if self.progress.step in steps:
            made.x0[0, 0, 3, 3] = value
        return made

    monkeypatch.setattr(Run, "examples", poisoned)


def test_a_poisoned_step_is_skipped_and_reported(tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    report = go(tmp_path / "run", steps=6)
    assert "step 4: the loss is nan" in report
    assert "images" in report
    step, tensors = state(tmp_path / "run")
    assert step == 6
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors.values())


def test_many_poisoned_steps_end_the_run_with_the_last_good_state(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(4, 100)))
    with pytest.raises(NonFiniteError, match="3 steps in a row were skipped"):
        go(tmp_path / "run", steps=50, max_bad_steps=3)
    step, tensors = state(tmp_path / "run")
    assert step == 7
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors.values())


def test_an_absurd_learning_rate_leaves_a_finite_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="lower --learning-rate"):
        go(tmp_path / "run", steps=400, learning_rate=1e30, warmup=0, max_bad_steps=2, save_every=1, validate_every=0)
    _, tensors = state(tmp_path / "run")
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors.values())


# Signals, locks and disks ---------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path, monkeypatch, signum, code):
    step = Run.step

    def interrupted(self, batch):
        if self.progress.step == 4:
            os.kill(os.getpid(), signum)
        return step(self, batch)

    monkeypatch.setattr(Run, "step", interrupted)
    with pytest.raises(Stopped, match=r"saved step 5 .* reverie train --out .* --resume") as caught:
        go(tmp_path / "run", steps=12)
    assert caught.value.exit_code == code
    monkeypatch.undo()
    again(tmp_path / "run")
    go(tmp_path / "whole", steps=12)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    refusals = []
    note = Run.note

    def second(self, report, bar):
        note(self, report, bar)
        if self.progress.step == 2:
            for resume in ("no", "yes"):
                with pytest.raises(UsageError, match=f"in use by.* {os.getpid()}") as caught:
                    train(quick(tmp_path / "run", steps=4), resume, io.StringIO())
                refusals.append(str(caught.value))

    monkeypatch.setattr(Run, "note", second)
    go(tmp_path / "run", steps=3)
    assert len(refusals) == 2


def watch(monkeypatch) -> list[int]:
    """Return a list that the steps of a run are added to as it reaches them."""
    reached, milestones = [], Run.milestones

    def watched(self):
        reached.append(self.progress.step)
        milestones(self)

    monkeypatch.setattr(Run, "milestones", watched)
    return reached


def full_disk(monkeypatch, fails):
    """Let writes into checkpoints fail as on a full disk while `fails()` says so."""
    put = storage.put

    def no_space(file, data):
        if fails() and "checkpoints" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device", str(file.name))
        return put(file, data)

    monkeypatch.setattr(storage, "put", no_space)


def test_a_full_disk_is_reported_and_the_next_save_tried(tmp_path, monkeypatch):
    reached = watch(monkeypatch)
    full_disk(monkeypatch, lambda: reached and reached[-1] == 6)
    report = go(tmp_path / "run", steps=8)
    assert "step 6 was not saved" in report
    assert state(tmp_path / "run")[0] == 8


def test_a_last_save_that_fails_ends_with_the_older_checkpoint_whole(tmp_path, monkeypatch):
    reached = watch(monkeypatch)
    full_disk(monkeypatch, lambda: reached and reached[-1] > 3)
    with pytest.raises(StorageError) as caught:
        go(tmp_path / "run", steps=5)
    assert caught.value.exit_code == 6
    assert state(tmp_path / "run")[0] == 3


def test_a_closed_terminal_does_not_end_the_run(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    train(quick(tmp_path / "run", steps=3), "no", Closed())
    assert state(tmp_path / "run")[0] == 3


def test_the_clock_may_be_set_back(tmp_path, monkeypatch):
    times = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(run.time, "time", lambda: float(next(times)))
    go(tmp_path / "run", steps=7)
    assert state(tmp_path / "run")[0] == 7
    seconds = [
        json.loads(line).get("seconds", 0) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(seconds) >= 0


def test_minutes_end_a_run_too(tmp_path):
    go(tmp_path / "run", minutes=0.01, validate_every=0)
    assert state(tmp_path / "run")[0] >= 1
