"""`reverie edit`: what it writes, tells and refuses."""

import json

import pytest
import torch
from PIL import Image

from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, SamplingDefaults
from reverie.models.formats import write_model
from reverie.models.model import Model


def make(folder, sampling):
    torch.manual_seed(0)
    card = Card(shape=(3, 8, 8), network=NetworkSpec(config={"in_channels": 3, "channels": [8, 8]}), sampling=sampling)
    return str(write_model(Model(build(card), card), folder))


def test_tasks_from_the_command_line(tmp_path, reverie):
    few = make(tmp_path / "few", SamplingDefaults(sampler="consistency", grid="angle", steps=2))
    small, out = tmp_path / "small.png", tmp_path / "out"
    Image.new("RGB", (4, 2), (90, 120, 150)).save(small)
    made = reverie("edit", few, small, "--task", "super-resolution", "--factor", 3, "-n", 2, "--out", out, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert [Image.open(file).size for file in found["files"]] == [(12, 6)] * 2
    assert (found["edit"]["task"], found["edit"]["factor"], found["settings"]["steps"]) == ("super-resolution", 3, 16)

    ends = json.loads(reverie("sample", few, "-n", 2, "--seed", 3, "--out", tmp_path / "ends", "--json").stdout)[
        "files"
    ]
    made = reverie("edit", few, ends[0], "--task", "interpolate", "--with", ends[1], "-n", 3, "--out", out, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["between"] == [[3, 4, 0.0], [3, 4, 0.5], [3, 4, 1.0]]


def test_what_is_refused(tmp_path, refused):
    few = make(tmp_path / "few", SamplingDefaults(sampler="consistency", grid="angle", steps=2))
    many, picture = make(tmp_path / "many", SamplingDefaults()), tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    for model, words, said in (
        (many, ["--task", "colourise"], "is for consistency models"),
        (few, ["--task", "interpolate"], "name that with --with"),
        (few, ["--task", "colourise", "--with", picture], "--with has no effect but on --task interpolate"),
        (few, ["--task", "interpolate", "--with", picture, "--strength", 1], "--strength has no effect"),
        (few, ["--task", "interpolate", "--with", picture], "holds no record"),
        (few, ["--task", "paint"], "--task"),
    ):
        code = 3 if said == "holds no record" else 2
        assert said in " ".join(refused(code, "edit", model, picture, *words, "--out", tmp_path / "out"))


@pytest.mark.parametrize(("strength", "line"), [("0.5", "3 steps of ddim from t = 0.5"), ("0", "no step was run")])
def test_the_steps_that_ran_are_told(reverie, models, tmp_path, strength, line):
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    words = ("--class", "cat", "--sampler", "ddim", "--steps", 3, "--strength", strength, "--out", tmp_path / "out")
    assert line in reverie("edit", models / "classes", tmp_path / "grey.png", *words).stderr
