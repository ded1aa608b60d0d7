"""What a run says of itself, and to whom it may not matter."""

import errno
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from reverie.base import storage
from reverie.base.errors import StorageError, UsageError
from reverie.training import metrics
from reverie.training.metrics import Console, MetricsLog, Tracker, Trackers, open_trackers


@pytest.fixture
def told() -> list[str]:
    """The warnings given."""
    return []


def lines(path) -> list[dict]:
    """The objects of a log, by a parser that knows no NaN."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


# Lines ----------------------------------------------------------------------------------------


def test_a_line_is_there_as_soon_as_it_is_written(path):
    with MetricsLog(path) as log:
        log.write(0, {"loss": 0.5})
        assert lines(path) == [{"step": 0, "loss": 0.5}]
        log.write(1, {"loss": 0.25, "lr": 1e-4})
        assert lines(path)[1] == {"step": 1, "loss": 0.25, "lr": 1e-4}


def test_numbers_keep_all_their_digits(path):
    with MetricsLog(path) as log:
        log.write(0, {"loss": 0.1 + 0.2})
    assert lines(path)[0]["loss"] == 0.1 + 0.2


def test_every_kind_of_value_becomes_valid_json(path):
    values = {
        "nan": float("nan"), "inf": float("inf"), "minus": -float("inf"),
        "tensor": torch.tensor(0.5), "bad": torch.tensor(float("nan")), "many": torch.arange(3),
        "numpy": np.float32(0.25), "array": np.array([1.0, np.inf]), "nested": {"a": (1, 2)}, "text": "x", "none": None,
    }  # fmt: skip
    with MetricsLog(path) as log:
        log.write(0, values)
    (line,) = lines(path)
    assert line == {
        "step": 0, "nan": "NaN", "inf": "Infinity", "minus": "-Infinity", "tensor": 0.5, "bad": "NaN",
        "many": [0, 1, 2], "numpy": 0.25, "array": [1.0, "Infinity"], "nested": {"a": [1, 2]}, "text": "x",
        "none": None,
    }  # fmt: skip
    assert np.isnan(float(line["nan"]))
    assert float(line["minus"]) == -np.inf


# Resuming -------------------------------------------------------------------------------------


def test_a_resumed_log_has_no_step_twice(path):
    with MetricsLog(path) as log:
        for step in range(10):
            log.write(step, {"loss": step / 10})
    before = path.read_bytes().splitlines(keepends=True)
    with MetricsLog(path, resume_at=6) as log:
        assert path.read_bytes() == b"".join(before[:6])
        for step in range(6, 10):
            log.write(step, {"loss": step / 10})
    assert path.read_bytes() == b"".join(before)


def test_resuming_at_step_0_starts_over(path):
    with MetricsLog(path) as log:
        log.write(0, {})
    with MetricsLog(path, resume_at=0):
        assert path.read_bytes() == b""


def test_resuming_without_a_log_starts_one(path):
    with MetricsLog(path, resume_at=5) as log:
        log.write(5, {})
    assert lines(path) == [{"step": 5}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 0.5}', b"\0\0\0\n", b"[]\n", b"{}\n"])
def test_a_line_broken_by_a_kill_is_dropped(path, torn):
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    with MetricsLog(path, resume_at=9) as log:
        log.write(9, {})
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 9}]


def test_a_log_that_needs_no_change_is_not_rewritten(path, monkeypatch):
    path.write_bytes(b'{"step": 1}\n')
    monkeypatch.setattr(metrics, "write_file", lambda *_: pytest.fail("rewritten"))
    with MetricsLog(path, resume_at=2):
        pass


def test_a_new_run_does_not_write_into_anothers_log(path):
    path.write_bytes(b'{"step": 1}\n')
    with pytest.raises(UsageError, match="is the log of a run; go on with --resume, or choose another folder"):
        MetricsLog(path)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_rewrite_that_fails_leaves_the_log(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(storage, "put", refuse)
    with pytest.raises(StorageError, match="no space left on device"):
        MetricsLog(path, resume_at=2)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert os.listdir(path.parent) == [path.name]


# A full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 7])
def test_a_full_disk_costs_one_warning_and_lines_but_not_the_log(path, told, monkeypatch, taken):
    put = storage.put

    def refuse(file, data):
        put(file, data[:taken])
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsLog(path, warn=told.append) as log:
        log.write(0, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "put", refuse)
            for step in range(1, 5):
                log.write(step, {"loss": 1.0})
        log.write(5, {"loss": 1.0})
    assert [line["step"] for line in lines(path)] == [0, 5]
    (warning,) = told
    assert f"cannot write {path}: no space left on device (" in warning
    assert warning.endswith("lines of the log are lost")


def test_a_real_limit_of_the_system_costs_one_warning(path):
    """RLIMIT_FSIZE, in a process of its own: 5000 bytes, then no more."""
    script = (
        "import resource, sys; from reverie.training.metrics import MetricsLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "with MetricsLog(sys.argv[1]) as log:\n"
        "    for step in range(1000): log.write(step, {'loss': 0.5})\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "warning: cannot write" in done.stderr
    with MetricsLog(path, resume_at=10**6):
        steps = [line["step"] for line in lines(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100


# A closed terminal ----------------------------------------------------------------------------


def test_a_reader_that_leaves_costs_one_warning(tmp_path):
    """`train | head -1`: the run ends with 0, with one warning, and with no complaint at its end."""
    script = (
        "import sys, time; from reverie.training.metrics import Console\n"
        "out = Console(sys.stdout)\n"
        "for step in range(200): out.say(f'step {step}'); time.sleep(0.001)\n"
        "open(sys.argv[1], 'w').write('finished')"
    )
    command = f'"{sys.executable}" -c "$SCRIPT" "{tmp_path}/end" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env=os.environ | {"SCRIPT": script}
    )
    assert done.returncode == 0
    assert done.stdout == "step 0\n"
    assert done.stderr == "warning: output is closed ([Errno 32] Broken pipe); the run goes on without it\n"
    assert (tmp_path / "end").read_text() == "finished"


def test_a_full_or_closed_stream_costs_one_warning(tmp_path, told):
    stream = (tmp_path / "out").open("w")
    stream.close()
    console = Console(stream, told.append)
    console.say("one")
    console.say("two")
    assert console.write("three") == 5
    assert not console.isatty()
    assert told == ["output is closed (I/O operation on closed file.); the run goes on without it"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_device_costs_one_warning(told):
    with open("/dev/full", "w") as stream:
        console = Console(stream, told.append)
        console.say("one")
        console.say("two")
    assert len(told) == 1
    assert "No space left on device" in told[0]


def test_a_progress_bar_writes_through_it(tmp_path, told):
    tqdm = pytest.importorskip("tqdm").tqdm
    with (tmp_path / "out").open("w") as stream:
        console = Console(stream, told.append)
        for step in tqdm(range(10), file=console, mininterval=0):
            if step == 5:
                stream.close()
    assert len(told) == 1
    assert "5/10" in (tmp_path / "out").read_text()


def test_a_warning_needs_no_listener(monkeypatch, capsys):
    metrics.warn("the disk is full")
    assert capsys.readouterr().err == "warning: the disk is full\n"
    monkeypatch.setattr(sys, "stderr", None)
    metrics.warn("nobody hears it")


# Trackers -------------------------------------------------------------------------------------


def read_back(folder) -> dict[str, list[tuple[int, float]]]:
    """The curves in TensorBoard's files, by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    images = {name: [(event.step, event.width) for event in events.Images(name)] for name in events.Tags()["images"]}
    return scalars | images


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = open_trackers(["tensorboard"], tmp_path, {"lr": 1e-3})
    with MetricsLog(tmp_path / "metrics.jsonl", trackers=trackers) as log:
        for step in range(3):
            log.write(step, {"loss": 0.5 * step, "norm": torch.tensor(2.0), "sampler": "ddim", "grid": [1, 2]})
        trackers.picture(2, "samples", torch.zeros(3, 4, 6, dtype=torch.uint8))
    assert read_back(tmp_path / "tensorboard") == {
        "loss": [(0, 0.0), (1, 0.5), (2, 1.0)],
        "norm": [(0, 2.0), (1, 2.0), (2, 2.0)],
        "samples": [(2, 6)],
    }
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_a_resumed_tensorboard_shows_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    for resume_at, steps in ((None, range(6)), (3, range(3, 8))):
        trackers = open_trackers(["tensorboard"], tmp_path, {}, resume_at)
        for step in steps:
            trackers.log(step, {"loss": float(step)})
        trackers.close()
        if resume_at is None:  # event files are ordered by the second in their names
            (file,) = (tmp_path / "tensorboard").iterdir()
            file.rename(file.with_name("events.out.tfevents.1.first"))
    assert read_back(tmp_path / "tensorboard")["loss"] == [(step, float(step)) for step in range(8)]


class Run:
    """What wandb.init returns."""

    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """The package, played: its runs in a list."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**options):
        if os.environ.get("WANDB_MODE") != "offline":
            raise RuntimeError("api_key not configured (no-tty).\nRun wandb login")
        module.runs.append(Run(**options))
        return module.runs[-1]

    module.init, module.Image = init, lambda array: ("image", array.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def test_wandb_is_told_the_same_offline(tmp_path, wandb):
    folder = tmp_path / "digits"
    folder.mkdir()
    for resume_at in (None, 3):
        trackers = open_trackers(["wandb"], folder, {"lr": float("inf"), "size": (8, 8)}, resume_at)
        trackers.log(3, {"loss": 0.5, "bad": torch.tensor(float("nan")), "sampler": "ddim"})
        trackers.picture(3, "samples", torch.zeros(3, 4, 6, dtype=torch.uint8))
        trackers.close()
    first, second = wandb.runs
    assert first.options["project"] == "reverie"
    assert first.options["name"] == "digits"
    assert first.options["config"] == {"lr": "Infinity", "size": [8, 8]}
    assert first.options["dir"] == str(folder)
    assert second.options["id"] == first.options["id"]  # a resumed run is the same run
    assert len(first.options["id"]) == 16
    (step, values), picture = first.logged
    assert step == 3
    assert values.keys() == {"loss", "bad"}
    assert values["loss"] == 0.5
    assert np.isnan(values["bad"])
    assert picture == (3, {"samples": ("image", (4, 6, 3))})
    assert first.finished


def test_wandb_without_a_key_says_what_to_do(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UsageError, match=r"wandb: api_key not configured.*; run `wandb login`, or set WANDB_MODE=off"):
        open_trackers(["wandb"], tmp_path, {})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_a_usage_error_and_nothing_is_made(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf'{name} is not installed .*; pip install "reverie\[tracking\]"') as caught:
        open_trackers([name], tmp_path, {})
    assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == []


def test_all_packages_are_asked_for_before_any_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="wandb is not installed"):
        open_trackers(["tensorboard", "wandb"], tmp_path, {})
    assert os.listdir(tmp_path) == []


def test_an_unknown_tracker_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="there is no tracker 'tensorbord', did you mean tensorboard"):
        open_trackers(["tensorbord"], tmp_path, {})
    assert os.listdir(tmp_path) == []


def test_no_tracker_is_none(tmp_path):
    trackers = open_trackers([], tmp_path, {})
    trackers.log(0, {"loss": 1.0})
    trackers.close()
    assert os.listdir(tmp_path) == []


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(told):
    class Broken(Tracker):
        def log(self, step, values):
            raise RuntimeError("the network is down")

    class Sound(Tracker):
        def __init__(self):
            self.steps = []

        def log(self, step, values):
            self.steps.append(step)

    sound = Sound()
    trackers = Trackers({"wandb": Broken(), "tensorboard": sound}, told.append)
    trackers.log(0, {"loss": 1.0})
    trackers.log(1, {"loss": 1.0})
    assert sound.steps == [0, 1]
    assert told == ["wandb failed (RuntimeError: the network is down); the run goes on without it"]
