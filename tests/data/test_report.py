"""The report: what it counts is there."""

import json

import numpy as np
import pytest
from PIL import Image

from reverie.base.errors import DataError, UsageError
from reverie.data.report import report


@pytest.fixture
def folder(tmp_path):
    """Four greys of two sizes in two classes, one of them twice, and a broken file."""
    for i, name in enumerate(["cat/a.png", "cat/b.png", "dog/c.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        side = 8 if i else 6
        Image.fromarray(np.full((side, side), 40 * i, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "dog" / "copy.png").write_bytes((tmp_path / "dog" / "c.png").read_bytes())
    (tmp_path / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_everything_is_counted(folder):
    found = report(str(folder))
    assert found.count == 4
    assert found.classes == {"cat": 2, "dog": 2}
    assert found.sizes == {"8x8": 3, "6x6": 1}
    assert found.modes == {"L": 4}
    assert found.duplicates == 1
    assert [path.rsplit("/")[-1] for pair in found.duplicate_pairs for path in pair] == ["copy.png", "c.png"]
    assert [path.rsplit("/")[-1] for path, _ in found.skipped] == ["broken.png"]
    assert len(found.fingerprint) == 64


def test_it_is_json_and_text(folder):
    found = report(str(folder))
    assert json.loads(json.dumps(found.to_json()))["count"] == 4
    text = found.to_text()
    for words in ("4 images", "2 of cat, 2 of dog", "broken.png", "copy.png is", "--on-bad skip", found.fingerprint):
        assert words in text


def test_it_says_what_to_look_at(folder):
    notes = report(str(folder)).suggestions
    assert any("1 of 5 files can't be read" in note for note in notes)
    assert any("exact copies" in note for note in notes)
    assert any("few" in note for note in notes)
    assert report("digits").suggestions == ()


def test_captions_are_counted():
    found = report("shapes:16,count=6")
    assert found.captions == 6
    assert found.caption_length >= 6


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError):
        report(str(tmp_path / "nowhere"))
    with pytest.raises(DataError):
        report(str(tmp_path))
