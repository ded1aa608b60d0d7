"""`reverie data`: the report on a data set."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, twenty pictures, two of them twins."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "dogs" / "twin.png").write_bytes((tmp_path / "photos" / "cats" / "3.png").read_bytes())
    return tmp_path / "photos"


def test_digits(reverie):
    outcome = reverie("data", "digits")
    assert outcome.exit_code == 0, outcome.stderr
    assert "1,797 images" in outcome.stdout
    assert "8x8" in outcome.stdout


def test_a_folder(reverie, photos):
    text = reverie("data", "photos").stdout
    for word in ("21", "cats", "dogs", "twin.png"):
        assert word in text


def test_one_json_object(reverie, photos):
    first = reverie("data", "photos", "--json")
    assert first.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    assert json.loads(reverie("data", photos, "--json").stdout)["fingerprint"] == found["fingerprint"]


def test_the_images_as_asked_for(reverie, photos):
    def shape(*words):
        return json.loads(reverie("data", "photos", "--json", *words).stdout)["shape"]

    assert shape("--size", 8) == [3, 8, 8]
    assert shape("--resolution", 8, "--channels", 1) == [1, 8, 8]


def test_files_that_cannot_be_read_are_named(reverie, photos):
    """A report is there to tell of them, however many."""
    (photos / "cats" / "0.png").write_bytes(b"")
    (photos / "cats" / "text.png").write_text("no picture")
    outcome = reverie("data", "photos")
    assert outcome.exit_code == 0, outcome.stderr
    assert "0.png" in outcome.stdout
    assert "text.png" in outcome.stdout


def test_as_training_would_refuse_them(refused, photos):
    (photos / "cats" / "0.png").write_bytes(b"")
    assert any("0.png" in line for line in refused(3, "data", "photos", "--on-bad", "refuse"))


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["nowhere"], 2, "nowhere"),
        (["digts"], 2, "did you mean digits?"),
        (["empty"], 3, "empty"),
        (["digits", "--size", 0], 2, "--size is 0; it must be a whole number, 1 <= x"),
        (["digits", "--channels", 2], 2, "--channels is 2; it must be one of 1, 3, 4"),
        (["digits", "--limit", 0], 2, "--limit is 0"),
        (["digits", "--max-bad", "nan"], 2, "--max-bad is nan"),
        (["digits", "--on-bad", "ignore"], 2, "--on-bad is ignore; it must be one of refuse, skip"),
    ],
)
def test_what_is_refused(refused, tmp_path, words, code, line):
    (tmp_path / "empty").mkdir()
    assert line in refused(code, "data", *words)[0]
