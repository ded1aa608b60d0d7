"""The profile of a run: its table accounts for the step, and the run goes on as if it had not been there."""

import io
import re

import pytest
import torch

from reverie.training.config import TrainConfig
from reverie.training.profiling import WARM_UP, Profile, is_backward, row_of
from reverie.training.trainer import train

SMALL = {"widths": (8,), "layers": 1, "batch_size": 4, "sample_every": 0, "validate_every": 0, "dtype": "float32"}


def test_the_table_accounts_for_the_step_and_the_weights_are_the_same(tmp_path):
    told = io.StringIO()
    steps = WARM_UP + 3
    for name, profile in (("with", 2), ("without", None)):
        train(TrainConfig(out=str(tmp_path / name), steps=steps, profile=profile, **SMALL), stream=told)
    said = told.getvalue().replace("\r", "\n")  # the progress bar, which a line pushes aside
    whole = float(re.search(r"a step takes ([\d.]+) ms \(mean of 2\)", said)[1])
    rows = re.findall(r"^  ([\w, ]+?) +([\d.]+) ms +(?:([\d.]+) ms)? +([\d.]+)%$", said, re.M)
    parts = {name: float(forward) + float(backward or 0) for name, forward, backward, _ in rows}
    assert sum(parts.values()) == pytest.approx(whole, rel=0.02, abs=0.5)
    assert {"convolution", "group norm", "optimiser", "Python, data"} <= parts.keys()
    weights = [
        next((tmp_path / name / "checkpoints").glob("*/model.safetensors")).read_bytes() for name in ("with", "without")
    ]
    assert weights[0] == weights[1]


def test_no_profile_is_the_step_alone():
    told: list[str] = []
    profile = Profile(None, told.append)
    assert [profile(lambda i=i: i) for i in range(10)] == list(range(10))
    assert not told
    assert profile.profiler is None


def test_a_step_that_fails_is_not_hidden():
    profile = Profile(1, lambda line: None)
    for _ in range(WARM_UP):
        profile(lambda: torch.ones(1) + 1)
    with pytest.raises(KeyError):
        profile(lambda: {}["a"])


@pytest.mark.parametrize(("name", "row", "backward"), [
    ("aten::mkldnn_convolution", "convolution", False),
    ("aten::convolution_backward", "convolution", True),
    ("AttendSelfBackward", "attention", True),
    ("aten::_fused_adamw_", "optimiser", False),
    ("aten::_foreach_lerp_", "optimiser", False),
    ("aten::addmm", "linear", False),
    ("aten::add_", "sums, copies", False),
    ("autograd::engine::evaluate_function: AddBackward0", "sums, copies", True),
])  # fmt: skip
def test_what_is_counted_where(name, row, backward):
    assert row_of(name) == row
    assert is_backward(name) is backward
