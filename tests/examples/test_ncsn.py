"""The noise-conditional score network of examples/, in its quick version: it learns, draws, and judges rightly."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image

import reverie as rv

PATH = Path(__file__).parent.parent.parent / "examples" / "ncsn.py"


@pytest.fixture(scope="module")
def ncsn():
    """The example as a module."""
    spec = spec_from_file_location("ncsn", PATH)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(ncsn, monkeypatch, capsys, *words):
    """Run the example, and return what it printed."""
    monkeypatch.setattr(sys, "argv", ["ncsn.py", *map(str, words)])
    with torch.random.fork_rng():
        ncsn.main()
    return capsys.readouterr().out


def shares(text):
    return torch.tensor([float(share) for share in re.findall(r"share (\S+),", text)])


def strays(text):
    """The percentage of points far from every mode."""
    return float(re.findall(r"every mode: (\S+)%", text)[0])


def errors(text):
    """The Fisher divergence at each level."""
    return [float(error) for error in re.findall(r"times sigma\^2: (\S+)", text)]


@pytest.mark.parametrize("words", [(160,), (100, "--sliced")], ids=["denoising", "sliced"])
def test_it_learns(ncsn, monkeypatch, capsys, words):
    """A tenth of the training: untrained, the divergence is up to 0.29, and 53 % of the points go astray."""
    text = run(ncsn, monkeypatch, capsys, "--count", 50, "--steps", *words)
    assert shares(text).sum().item() == pytest.approx(1, abs=0.003)
    assert max(errors(text)) < 0.2
    assert strays(text) < 40


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--sliced",)], ids=["denoising", "sliced"])
def test_modes_are_found_in_their_shares(ncsn, monkeypatch, capsys, words):
    """4000 points: 0.035 is 4.6 standard errors, a false alarm in 1 run of 50,000; the seed is fixed."""
    text = run(ncsn, monkeypatch, capsys, *words)
    assert (shares(text) - ncsn.SHARES).abs().max() < 0.035
    assert max(errors(text)) < 0.03
    assert strays(text) < 2


def test_the_judge_tells_a_lost_mode_and_stray_points(ncsn, capsys):
    truth = ncsn.mixture(rv.schedules["ve"](sigma_max=5.0))
    times = rv.grids["log-snr"](truth.schedule, 10)[:-1]
    ncsn.judge(truth, torch.cat([ncsn.MODES[:1], ncsn.MODES[1:2], torch.zeros(2, 2)]), times)
    text = capsys.readouterr().out
    assert "every mode: 50.00%" in text
    assert shares(text)[2:].max() <= 0.5
    assert set(errors(text)) == {0.0}
    ncsn.judge(truth, truth.draw(4000), times)
    text = capsys.readouterr().out
    assert (shares(text) - ncsn.SHARES).abs().max() < 0.035  # 4.6 standard errors: a false alarm in 1 run of 50,000


def test_digits_are_written(ncsn, monkeypatch, capsys, tmp_path):
    path = tmp_path / "digits.png"
    text = run(ncsn, monkeypatch, capsys, "--data", "digits", "--steps", 3, "--count", 4, "--out", path)
    assert str(path) in text
    with Image.open(path) as picture:
        assert picture.width > 2 * 56
        assert len(picture.getcolors(10_000)) > 10
