"""`reverie doctor`: a line for each thing, or one JSON object."""

import json

import pytest
import torch

from reverie.cli import doctor, machine, measure
from reverie.cli.measure import Claim

SPEED = {
    "convolution": {"float32": 100.0, "bfloat16": 200.0},
    "matrix_product": {"float32": 50.0, "bfloat16": 60.0},
    "training": {"float32": 10.0, "bfloat16": 17.0},
    "bfloat16_gain": 1.7,
    "recommended": "bfloat16",
}
FAST = {"dtype": "bfloat16", "packed": True, "gain": 1.9, "error": 0.009}
EXTRAS = {
    "hub": {"for": "data sets", "missing": [], "install": "pip install 'reverie[hub]'"},
    "tracking": {"for": "W&B", "missing": ["wandb"], "install": "pip install 'reverie[tracking]'"},
}
CLAIMS = ["from run to run", "in any place, among any others", "at any batch size", "with one thread and with all"]


def claims(*answers):
    return [Claim(name, dtype, holds) for dtype in measure.DTYPES for name, holds in zip(CLAIMS, answers, strict=True)]


@pytest.fixture
def quick(monkeypatch):
    """Nothing measured, nothing read."""
    monkeypatch.setattr(measure, "speeds", lambda: SPEED)
    monkeypatch.setattr(measure, "fast", lambda: FAST)
    monkeypatch.setattr(measure, "promise", lambda: claims(True, True, False, None))
    monkeypatch.setattr(machine, "extras", lambda: EXTRAS)
    monkeypatch.setattr(doctor, "gpus", list)


def test_the_report(reverie, quick):
    outcome = reverie("doctor")
    assert outcome.exit_code == 0
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[0].startswith("reverie 0")
    assert f"torch {torch.__version__}" in lines[0]
    assert "GPU none that torch sees" in lines
    assert "hub installed" in lines
    assert "tracking no wandb: pip install 'reverie[tracking]' (W&B)" in lines
    assert "convolution 100.0 200.0 GFLOP/s" in lines
    assert "recommended --dtype bfloat16 (bfloat16 trains 1.7 times as fast)" in lines
    said = "bfloat16, weights laid out once: 1.9 times as fast, 0.9 % off (a step of a small U-Net, 32x32)"
    assert f"--speed fast {said}" in lines
    assert "from run to run yes yes" in lines
    assert "at any batch size no no" in lines
    assert "with one thread and with all - -" in lines
    assert lines[-1].startswith("so exact sampling, which fixes the batch's size, gives the same picture")
    assert outcome.stderr == "measuring: a few seconds\n"


def test_a_promise_that_does_not_hold_is_said(reverie, quick, monkeypatch):
    monkeypatch.setattr(measure, "promise", lambda: claims(True, False, False, None))
    last = reverie("doctor").stdout.splitlines()[-1]
    assert "does NOT hold on this machine" in last


def test_one_json_object(reverie, quick):
    found = json.loads(reverie("doctor", "--json").stdout)
    assert found["speed"] == SPEED
    assert found["promise"][0] == {"claim": "from run to run", "dtype": "float32", "holds": True}
    assert found["hardware"]["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert {"reverie", "python", "torch", "compiler", "gpus", "extras"} <= found.keys()


def test_gpus_with_their_memory(reverie, quick, monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": "Card", "memory": 2**33}, {"name": "Other", "memory": None}])
    assert "Card, 8.0 GiB; Other" in reverie("doctor").stdout


def test_gpus_of_this_machine():
    assert len(doctor.gpus()) >= torch.cuda.device_count()


@pytest.mark.slow
def test_for_real(reverie):
    found = json.loads(reverie("doctor", "--json").stdout)
    assert all(
        value > 0 for kind in ("convolution", "matrix_product", "training") for value in found["speed"][kind].values()
    )
    assert found["speed"]["recommended"] in ("float32", "bfloat16")
    assert len(found["promise"]) == 8


def test_what_serves_on_a_gpu_is_said_where_there_is_one(reverie, quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "operators on a GPU\n  norms, gated units" in reverie("doctor").stdout
