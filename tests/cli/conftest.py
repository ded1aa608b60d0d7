"""What the tests of the command line share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from reverie.cli.main import cli
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, ScheduleSpec
from reverie.models.formats import write_model
from reverie.models.model import Model


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything in a folder, to compare before and after."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def reverie(tmp_path, monkeypatch):
    """Run the command line in a folder of its own, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        return CliRunner().invoke(cli, [str(word) for word in words])

    return run


@pytest.fixture
def refused(reverie, tmp_path):
    """Run a command line that must be refused: its code and lines, nothing made, no traceback, no result."""

    def run(code: int, *words: object) -> list[str]:
        before = tree(tmp_path)
        outcome = reverie(*words)
        assert outcome.exit_code == code, outcome.output
        assert outcome.stdout == ""
        assert "Traceback" not in outcome.stderr
        assert tree(tmp_path) == before
        lines = outcome.stderr.splitlines()
        assert all(line.startswith("error: ") for line in lines), lines
        return [line.removeprefix("error: ") for line in lines]

    return run


@pytest.fixture
def process(tmp_path):
    """Run the command line as a process of its own."""

    def run(*words: object, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from reverie.cli.main import main; main()", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, "env": environment}
        return subprocess.run(command, **{**settings, **options})

    return run


def small_model(classes=(), seed=0):
    """Return a tiny model with random weights that draws in a moment."""
    config = {"in_channels": 1, "channels": [8, 8], "norm_num_groups": 4}
    config |= {"num_class_embeds": len(classes) + 1} if classes else {}
    schedule = ScheduleSpec(options={"timesteps": 100})
    card = Card(shape=(1, 8, 8), network=NetworkSpec(config=config), classes=classes, schedule=schedule)
    denoiser = build(card)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Model(denoiser, card)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Three models on the disk: plain, classes (cat, dog, emu), and other, which is plain with other weights."""
    folder = tmp_path_factory.mktemp("models")
    write_model(small_model(), folder / "plain")
    write_model(small_model(("cat", "dog", "emu")), folder / "classes")
    write_model(small_model(seed=1), folder / "other")
    return folder
