"""Training on a GPU: near what it is on the CPU, and resumed as if it had not been interrupted."""

import io
import json

import pytest
import torch

from reverie.models.checkpoints import CheckpointStore
from reverie.models.load import load
from reverie.training import trainer
from reverie.training.config import TrainConfig
from reverie.training.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = {
    "widths": (16, 32), "attention": (False, True), "layers": 1, "batch_size": 16, "save_every": 4, "sample_every": 0,
    "validate_every": 0, "log_every": 1, "limit": 80,
}  # fmt: skip


def go(folder, resume="no", **settings):
    """Train, and return the losses by step."""
    train(TrainConfig(out=str(folder), **((QUICK | settings) if resume == "no" else settings)), resume, io.StringIO())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_losses_are_those_of_the_cpu(tmp_path):
    here = go(tmp_path / "cpu", device="cpu", dtype="float32", steps=6)
    there = go(tmp_path / "gpu", device="cuda", dtype="float32", steps=6)
    half = go(tmp_path / "half", device="cuda", dtype="bfloat16", steps=6)
    assert there == pytest.approx(here, rel=2e-3)
    assert half == pytest.approx(here, rel=0.05)
    assert load(tmp_path / "half", device="cuda").sample(1, steps=2).images.isfinite().all()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = go(tmp_path / "whole", device="cuda", steps=8)
    go(tmp_path / "cut", device="cuda", steps=4)
    assert go(tmp_path / "cut", "yes", steps=8) == whole
    one, two = (CheckpointStore(tmp_path / name / "checkpoints").latest() for name in ("whole", "cut"))
    for group in one.groups:
        for name, value in one.tensors(group).items():
            assert torch.equal(value, two.tensors(group)[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_are_plain_ones(tmp_path, monkeypatch, dtype):
    recorded = go(tmp_path / "recorded", device="cuda", dtype=dtype, steps=6)
    monkeypatch.setattr(trainer, "graphs", lambda *_: False)
    assert go(tmp_path / "plain", device="cuda", dtype=dtype, steps=6) == pytest.approx(recorded, rel=1e-4)
