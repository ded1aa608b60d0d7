"""The consistency model of examples/, in its quick version: it comes nearer to the exact map, and is judged rightly."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import reverie as rv
from reverie.diffusion.few_step.exact import Exact

PATH = Path(__file__).parent.parent.parent / "examples" / "consistency.py"


@pytest.fixture(scope="module")
def consistency():
    """The example as a module."""
    spec = spec_from_file_location("consistency_example", PATH)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(consistency, monkeypatch, capsys, *words):
    """Run the example, and return the distances from the exact map that it printed."""
    monkeypatch.setattr(sys, "argv", ["consistency.py", *map(str, words)])
    with torch.random.fork_rng():
        consistency.main()
    return [float(found) for found in re.findall(r"exact map ([0-9.]+);", capsys.readouterr().out)]


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("consistency", "training")]


@pytest.mark.parametrize("method", ["easy-consistency", *SLOW])
def test_it_comes_nearer_to_the_exact_map(consistency, monkeypatch, capsys, method):
    """A fortieth of the training; the mean of the data, all that one step of a diffusion model can give, is at 0.97."""
    *before, after = run(
        consistency, monkeypatch, capsys, "--method", method, "--teach", 80, "--steps", 100, "--count", 100
    )
    assert len(before) == (method != "training")
    assert after < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("easy-consistency", 0.45), ("consistency", 0.45)])
def test_all_of_the_training(consistency, monkeypatch, capsys, method, most):
    before, after = run(consistency, monkeypatch, capsys, "--method", method)
    assert before > 0.9
    assert after < most


def test_the_judge_knows_the_exact_map(consistency, capsys):
    truth = consistency.mixture(rv.schedules["edm"]())
    consistency.judge("exact", Exact(truth, 1e-4), 50)
    text = capsys.readouterr().out
    assert float(re.findall(r"exact map ([0-9.]+);", text)[0]) < 0.001
    assert "stray points 0.00%" in text
