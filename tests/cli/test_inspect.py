"""`reverie inspect`: models and pictures, whole and damaged."""

import json
import shutil

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def test_a_model(reverie, models):
    found = json.loads(reverie("inspect", models / "classes", "--json").stdout)
    assert found["kind"] == "diffusers"
    assert found["classes"] == ["cat", "dog", "emu"]
    assert found["shape"] == [1, 8, 8]
    assert found["parameters"] > 1000
    assert len(found["sha256"]) == 64
    text = reverie("inspect", models / "classes").stdout
    assert "cat, dog, emu" in text
    assert found["sha256"] in text


def test_a_picture_says_how_it_was_made(reverie, models):
    made = json.loads(reverie("sample", models / "classes", "-n", 1, "--class", 1, "--steps", 2, "--json").stdout)
    found = json.loads(reverie("inspect", made["files"][0], "--json").stdout)
    assert (found["kind"], found["program"]) == ("picture", "reverie")
    assert found["settings"]["classes"] == ["dog"]
    assert found["settings"]["seeds"] == made["seeds"]
    assert "dog" in reverie("inspect", made["files"][0]).stdout


def test_a_picture_of_another_program(reverie, tmp_path):
    texts = PngInfo()
    texts.add_text("parameters", "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 12")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=texts)
    found = json.loads(reverie("inspect", "a.png", "--json").stdout)
    assert found["settings"]["prompt"] == "a cat"
    assert found["settings"]["Seed"] == "12"


def test_a_damaged_model_is_described_as_far_as_it_goes(reverie, models, tmp_path):
    shutil.copytree(models / "plain", tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    outcome = reverie("inspect", "damaged", "--json")
    assert outcome.exit_code == 4
    assert json.loads(outcome.stdout)["problem"] in outcome.stderr
    assert "checksum" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(("name", "code"), [("none", 2), ("empty", 4), ("text.png", 4), ("half.png", 3)])
def test_what_is_nothing(refused, tmp_path, name, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20])
    (line,) = refused(code, "inspect", name)
    assert name in line
