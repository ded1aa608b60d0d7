"""`reverie train`: every field is a flag, a file may hold them, and a refused command makes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reverie.base.errors import Stopped
from reverie.cli import train as module
from reverie.cli.options import flag
from reverie.training.config import TrainConfig


@pytest.fixture
def told(reverie, monkeypatch):
    """Put a stand-in in the trainer's place, and return what it is told."""
    seen = {}

    def train(config, resume):
        seen.update(config=config, resume=resume)
        return Path(config.out)

    monkeypatch.setattr(module, "trainer", lambda: train)

    def run(*words):
        outcome = reverie("train", *words)
        assert outcome.exit_code == 0, outcome.stderr
        return seen | {"outcome": outcome}

    return run


def test_every_field_is_a_flag_with_its_help(reverie):
    text = " ".join(reverie("train", "--help").stdout.split()).replace("- ", "-")
    for name, field in TrainConfig.model_fields.items():
        assert flag(name) in text
        assert " ".join(field.description.split())[:20].replace("- ", "-") in text


def test_flags_arrive(told):
    config = told(
        "--data", "photos", "-o", "runs/a", "--steps", 10, "--lr", "1e-3", "--widths", "16,32", "--no-labels",
        "--flip", "--attention", "no,yes", "--ema", "0.9,0.99", "--dtype", "bfloat16", "--track", "tensorboard",
        "--minutes", "0.5",
    )["config"]  # fmt: skip
    assert config == TrainConfig(
        data="photos", out="runs/a", steps=10, learning_rate=1e-3, widths=(16, 32), labels=False, flip=True,
        attention=(False, True), ema=(0.9, 0.99), dtype="bfloat16", track=("tensorboard",), minutes=0.5,
    )  # fmt: skip


def test_names_of_other_trainers(told):
    config = told(
        "--train_data_dir", "photos", "--output_dir", "runs/a", "--max_train_steps", 10, "--train_batch_size", 4,
        "--resolution", 32, "--learning_rate", "1e-3", "--gradient_accumulation_steps", 2, "--report_to", "tensorboard",
        "--lr_warmup_steps", 5, "--checkpointing_steps", 100, "--max_grad_norm", 2, "--random_flip",
    )["config"]  # fmt: skip
    assert config == TrainConfig(
        data="photos", out="runs/a", steps=10, batch_size=4, size=32, learning_rate=1e-3, accumulate=2,
        track=("tensorboard",), warmup=5, save_every=100, clip_norm=2.0, flip=True,
    )  # fmt: skip


def test_the_run_is_the_result_and_the_next_command_a_note(told):
    outcome = told("--out", "runs/my run")["outcome"]
    assert outcome.stdout == "runs/my run\n"
    assert outcome.stderr == "next: reverie sample 'runs/my run' -n 16\n"


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], "no"), (["--resume"], "yes"), (["--resume", "auto"], "auto"), (["--resume=auto"], "auto"),
        (["--resume_from_checkpoint", "latest"], "yes"),
    ],
)  # fmt: skip
def test_resume(told, words, mode):
    seen = told("--out", "runs/a", *words)
    assert seen["resume"] == mode
    assert seen["config"].model_fields_set == {"out"}


def test_resume_takes_no_other_word(refused):
    (line,) = refused(2, "train", "--resume", "runs/a")
    assert line == "--resume is runs/a; it takes nothing, or auto, and --out names the run"


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_file_and_flags_over_it(told, tmp_path, kind):
    values = {"out": "runs/a", "batch-size": 4, "widths": [8, 16], "learning_rate": 1e-3, "flip": True}
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    (tmp_path / f"a.{kind}").write_text(toml if kind == "toml" else json.dumps(values))
    config = told("--config", f"a.{kind}", "--batch-size", 8, "--no-flip")["config"]
    assert config == TrainConfig(out="runs/a", batch_size=8, widths=(8, 16), learning_rate=1e-3, flip=False)


WRONG = [
    ("--learning-rate", "-1", "a number, x > 0"),
    ("--batch-size", "0", "a whole number, 1 <= x"),
    ("--steps", "0", "a whole number, x >= 1"),
    ("--steps", "1e-3 ", "a whole number, x >= 1"),
    ("--learning-rate", "1e-3 ", "a number, x > 0"),
    ("--dropout", "nan", "a number, 0 <= x < 1"),
    ("--minutes", "inf", "a number, x > 0"),
    ("--preset", "huge", "one of auto, tiny, small, base, large"),
    ("--widths", "32,,64", "a whole number"),
    ("--keep", "1", "a whole number, x >= 2"),
    ("--seed", "-1", "a whole number, 0 <= x"),
    ("--attention", "maybe", "true or false"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_wrong_values(refused, name, value, allowed):
    """RELIABILITY 6, case 7: the key, the value, what is allowed; nothing made."""
    (line,) = refused(2, "train", "--out", "runs/a", name, value)
    assert line.startswith(f"{name} is ")
    assert f"; it must be {allowed}" in line


def test_all_that_is_wrong_at_once(refused):
    lines = refused(2, "train", "--learning-rate", -1, "--batch-size", 0, "--steps", "1e-3 ", "--dropout", "nan")
    assert len(lines) == 5
    assert [line.split()[0] for line in lines] == ["--out", "--steps", "--batch-size", "--learning-rate", "--dropout"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--accumulate", 3], "accumulate (3) must divide batch_size (32)"),
        (["--schedule", "linaer"], "linaer"),
        (["--objective", "hybrid"], "learned_variance"),
    ],
)
def test_what_does_not_go_together(refused, words, line):
    assert line in refused(2, "train", "--out", "runs/a", *words)[0]


def test_every_number_refuses_what_is_no_number(refused):
    """So that no field is ever added whose range lets NaN through."""
    for name, field in TrainConfig.model_fields.items():
        if field.annotation in (float, float | None, int, int | None):
            for value in ("nan", "inf", "-inf", "x"):
                (line,) = refused(2, "train", "--out", "runs/a", flag(name), value)
                assert line.startswith(f"{flag(name)} is {value}; it must be a ")


FILES = {
    "a.toml": ("learing_rate = 1e-3", "there is no setting learing_rate (in a.toml), did you mean learning_rate?"),
    "text.toml": ('learning_rate = "1e-3"', "learning_rate (in text.toml) is 1e-3; it must be a number, x > 0"),
    "text.json": ('{"steps": "10"}', "steps (in text.json) is 10; it must be a whole number"),
    "target.toml": ('_target_ = "builtins.exec"', "there is no setting _target_ (in target.toml)"),
    "nested.toml": ('[data]\n_target_ = "builtins.exec"', "data (in nested.toml) is "),
    "nan.toml": ("learning_rate = nan", "learning_rate (in nan.toml) is nan; it must be a number, x > 0"),
    "date.toml": ("steps = 2026-01-01", "steps (in date.toml) is "),
    "a.yaml": ("!!python/object/apply:os.system ['touch canary']", "a.yaml: YAML is not read; write TOML"),
    "deep.json": ("[" * 1000, "deep.json: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_wrong(refused, tmp_path, name):
    """RELIABILITY 6, cases 6 and 8."""
    text, line = FILES[name]
    (tmp_path / name).write_text(text)
    lines = refused(2, "train", "--out", "runs/a", "--config", name)
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_a_file_that_is_not_there(refused):
    assert refused(2, "train", "--config", "none.toml") == ["none.toml: there is no such file"]


def test_a_stop_tells_what_was_saved(reverie, monkeypatch):
    def train(config, resume):
        raise Stopped("stopped; saved step 3 of runs/a", signal.SIGTERM)

    monkeypatch.setattr(module, "trainer", lambda: train)
    outcome = reverie("train", "--out", "runs/a")
    assert (outcome.exit_code, outcome.stderr, outcome.stdout) == (143, "stopped; saved step 3 of runs/a\n", "")


# For real -------------------------------------------------------------------------------------

TINY = ("--data", "digits", "--limit", 64, "--widths", "8,8", "--layers", 1, "--attention", "no,no", "--batch-size", 8)
QUIET = ("--sample-every", 0, "--validate-every", 0, "--warmup", 0)


def started(tmp_path, *words, **options):
    """Return a training that runs as a process of its own."""
    command = [sys.executable, "-c", "from reverie.cli.main import main; main()", "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE, **options)


def test_train_sample_and_inspect(reverie, tmp_path):
    outcome = reverie("train", "--out", "runs/a", *TINY, *QUIET, "--steps", 4)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout == "runs/a\n"
    drawn = reverie("sample", "runs/a", "-n", 2, "--class", 7, "--steps", 2, "--json")
    assert json.loads(drawn.stdout)["classes"] == ["7", "7"]
    found = reverie("inspect", "runs/a", "--json")
    assert json.loads(found.stdout)["training"]["steps"] == 4


def test_the_run_is_not_begun_twice_and_goes_on_when_asked(reverie, refused, tmp_path):
    assert "there is no run to resume" in refused(2, "train", "--out", "runs/a", "--resume")[0]
    assert reverie("train", "--out", "runs/a", *TINY, *QUIET, "--steps", 2).exit_code == 0
    assert "--resume" in refused(2, "train", "--out", "runs/a", *TINY, *QUIET, "--steps", 4)[0]
    outcome = reverie("train", "--out", "runs/a", "--resume", "--steps", 4)
    assert outcome.exit_code == 0, outcome.stderr
    outcome = reverie("train", "--out", "runs/a", "--resume", "--batch-size", 16)
    assert outcome.exit_code == 4
    assert "batch_size is 8 there, 16 here" in outcome.stderr


def test_refusals_of_the_trainer_make_nothing(refused, tmp_path):
    assert "nowhere" in refused(2, "train", "--data", "nowhere", "--out", "runs/a")[0]
    assert "device warp is not there" in refused(2, "train", *TINY, "--out", "runs/a", "--device", "warp")[0]
    assert "eps has no meaning" in refused(2, "train", *TINY, "--out", "runs/a", "--zero-snr", "--prediction", "eps")[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    assert "holds no run" in refused(2, "train", *TINY, "--out", "mine")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends(tmp_path, reverie, signum, code):
    """RELIABILITY 6, case 17."""
    child = started(tmp_path, "--out", "runs/a", *TINY, *QUIET, "--steps", 100_000, stdout=subprocess.PIPE)
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, child)
    child.send_signal(signum)
    out, said = child.communicate(timeout=60)
    assert child.returncode == code
    assert out == ""
    assert "Traceback" not in said
    assert "go on with: reverie train --out runs/a --resume" in said.splitlines()[-1]
    assert reverie("inspect", "runs/a").exit_code == 0


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads(tmp_path, reverie):
    """`reverie train 2>&1 | head -1`: RELIABILITY 6, case 22."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from reverie.cli.main import main; main()", "train", "--out", "runs/a"]
    words = [*map(str, (*TINY, *QUIET, "--steps", 30))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], cwd=tmp_path, env=environment, stdout=writer, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    assert json.loads(reverie("inspect", "runs/a", "--json").stdout)["training"]["steps"] == 30


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path, refused, reverie):
    """RELIABILITY 6, case 9: the second is told who is there; what a killed one left is taken over."""
    child = started(tmp_path, "--out", "runs/a", *TINY, *QUIET, "--steps", 100_000, "--save-every", 5)
    checkpoints = tmp_path / "runs" / "a" / "checkpoints"
    wait_for(lambda: any(checkpoints.glob("step-00000??5")), child)
    for words in ([], ["--resume"], ["--resume", "auto"]):
        outcome = reverie("train", "--out", "runs/a", *TINY, *words)
        assert outcome.exit_code == 2
        assert f"in use by pid {child.pid}" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1
    child.kill()
    child.communicate()
    outcome = reverie("train", "--out", "runs/a", "--resume", "--steps", 1)
    assert outcome.exit_code == 0, outcome.stderr


def wait_for(ready, child, seconds=90):
    """Wait until something is so, while a process lives."""
    end = time.monotonic() + seconds
    while not ready():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
