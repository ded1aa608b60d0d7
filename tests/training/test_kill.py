"""kill -9 at random moments, then --resume: the run that was killed is the run that was not."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reverie.models.checkpoints import CheckpointStore

SETTINGS = [
    "--data", "digits", "--steps", "24", "--widths", "8,8", "--layers", "1", "--batch-size", "8", "--save-every", "1",
    "--sample-every", "0", "--validate-every", "0", "--threads", "1", "--device", "cpu", "--dtype", "float32",
]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "reverie", "train", "--out", str(folder), *SETTINGS, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_progress(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    """Return so many seconds after the process has saved something, or when it has ended."""
    before = set((folder / "checkpoints").glob("step-*"))
    while process.poll() is None and set((folder / "checkpoints").glob("step-*")) == before:
        time.sleep(0.01)
    time.sleep(seconds)


def kill_and_resume(folder: Path, kills: int, seed: int) -> int:
    """Kill a run so many times at random moments, let it end, and return how many kills struck it alive."""
    moments, struck = random.Random(seed), 0
    for _ in range(kills):
        process = start(folder, "--resume", "auto")
        wait_for_progress(process, folder, moments.uniform(0, 0.15))
        struck += process.poll() is None
        process.kill()
        process.communicate()
    process = start(folder, "--resume", "auto")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return struck


def final_tensors(folder: Path) -> dict:
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    assert checkpoint.step == 24
    return {(group, name): value for group in checkpoint.groups for name, value in checkpoint.tensors(group).items()}


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, kills):
    process = start(tmp_path / "whole")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    struck = kill_and_resume(tmp_path / "killed", kills, seed=kills)
    assert struck >= kills // 2
    whole, killed = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [key for key in whole if not torch.equal(whole[key], killed[key])] == []
    assert not list((tmp_path / "killed" / "checkpoints").glob("*tmp*"))
