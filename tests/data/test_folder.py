"""Folders and archives of images: classes, captions, and files that are none."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.base.errors import DataError, UsageError
from reverie.data import open_dataset


def picture(index: int = 0, size=(8, 8), mode="RGB") -> Image.Image:
    """A picture that differs from index to index."""
    random = np.random.default_rng(index)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def png(index: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    picture(index, **options).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder, count: int):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(png(i))
    return folder


def break_three(folder):
    jpeg = io.BytesIO()
    picture(1, size=(64, 64)).save(jpeg, "JPEG")
    (folder / "bad-a.jpg").write_bytes(jpeg.getvalue()[:300])
    (folder / "bad-b.png").write_bytes(b"")
    (folder / "bad-c.png").write_text("this is a text")


def test_three_bad_files_of_a_hundred_are_named_and_refused(tmp_path):
    break_three(fill(tmp_path / "images", 97))
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / "images"))
    for name in ("bad-a.jpg", "bad-b.png", "bad-c.png"):
        assert name in str(caught.value)
    assert caught.value.exit_code == 3


def test_skipped_they_leave_the_data_set_of_the_good_ones(tmp_path):
    break_three(fill(tmp_path / "some", 97))
    fill(tmp_path / "good", 97)
    some, good = open_dataset(str(tmp_path / "some"), on_bad="skip"), open_dataset(str(tmp_path / "good"))
    assert [skipped.path.rsplit("/")[-1] for skipped in some.skipped] == ["bad-a.jpg", "bad-b.png", "bad-c.png"]
    assert len(some) == 97
    assert torch.equal(some.images(range(97)), good.images(range(97)))
    assert some.fingerprint == good.fingerprint


def test_one_bad_file_of_two_hundred_is_skipped_without_asking(tmp_path):
    fill(tmp_path, 200)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    assert [skipped.path.rsplit("/")[-1] for skipped in open_dataset(str(tmp_path)).skipped] == ["bad.png"]


def test_a_folder_of_bad_files_alone_is_refused_even_when_they_may_be_skipped(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.png"):
        open_dataset(str(tmp_path), on_bad="skip")


def test_a_missing_path_and_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="nowhere") as missing:
        open_dataset(str(tmp_path / "nowhere"))
    assert missing.value.exit_code == 2
    for text in (False, True):
        if text:
            (tmp_path / "notes.txt").write_text("no image here")
        with pytest.raises(DataError):
            open_dataset(str(tmp_path))


@pytest.mark.parametrize("side", [9000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (side, side)).save(tmp_path / "bomb.png", optimize=True)
    fill(tmp_path, 3)

    data = open_dataset(str(tmp_path), on_bad="skip")
    assert "decompression bomb" in data.skipped[0].reason
    assert len(data) == 3


def test_a_file_that_breaks_later_is_named_and_replaced(tmp_path):
    fill(tmp_path, 200)
    data = open_dataset(str(tmp_path), cache=0)
    assert torch.equal(data.images([5]), data.images([5]))
    path = tmp_path / "005.png"
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(data.images([5]), data.images([6]))
    assert [broken.path.rsplit("/")[-1] for broken in data.broken] == ["005.png"]


def test_too_many_that_break_later_end_the_run(tmp_path):
    fill(tmp_path, 100)
    data = open_dataset(str(tmp_path), cache=0)
    for i in range(5):
        (tmp_path / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"000\.png"):
        data.images(range(10))


def test_nested_folders_are_classes(tmp_path):
    fill(tmp_path / "dog", 2)
    fill(tmp_path / "cat", 3)
    data = open_dataset(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.labels(range(5)).tolist() == [0, 0, 0, 1, 1]


def test_metadata_gives_captions_and_labels(tmp_path):
    fill(tmp_path, 3)
    rows = [{"file_name": f"{i:03d}.png", "text": f"picture {i}"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_dataset(str(tmp_path))
    assert [data.caption(i) for i in range(3)] == ["picture 0", "picture 1", "picture 2"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_the_folder(tmp_path, kind):
    fill(tmp_path / "images" / "cat", 2)
    fill(tmp_path / "images" / "dog", 2)
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((tmp_path / "images").rglob("*.png")):
                archive.write(file, file.relative_to(tmp_path / "images"))
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "images", ".")
    folder, packed = open_dataset(str(tmp_path / "images")), open_dataset(str(path))
    assert packed.classes == ("cat", "dog")
    assert torch.equal(folder.images(range(4)), packed.images(range(4)))


def test_an_archive_with_a_member_outside_or_cut_in_the_middle_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../outside.png", "inside.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
    with pytest.raises(DataError, match="outside"):
        open_dataset(str(tmp_path / "evil.tar"))
    fill(tmp_path / "images", 20)
    with tarfile.open(tmp_path / "cut.tar", "w") as archive:
        archive.add(tmp_path / "images", ".")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:7000])
    with pytest.raises(DataError, match=r"cut\.tar"):
        open_dataset(str(tmp_path / "cut.tar"))
    assert sorted(path.name for path in tmp_path.parent.iterdir() if "outside" in path.name) == []


def test_every_kind_of_pixel_becomes_what_is_stated(tmp_path):
    """Golden pixels: alpha over white, 16 bits scaled, palettes and CMYK to RGB, EXIF turned, first frame."""
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "a-rgba.png")
    Image.new("L", (2, 2), 100).save(tmp_path / "b-grey.png")
    Image.fromarray(np.full((2, 2), 257 * 77, dtype=np.uint16)).save(tmp_path / "c-16bit.png")
    Image.new("RGB", (2, 2), (10, 200, 30)).quantize(4).save(tmp_path / "d-palette.png")
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "e-cmyk.tif")
    turned = Image.new("RGB", (2, 2), (0, 0, 0))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path / "f-turned.png", exif=exif)
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("blue", "red")]
    frames[0].save(tmp_path / "g-animated.gif", save_all=True, append_images=frames[1:])
    data = open_dataset(str(tmp_path), size=2)
    images = data.images(range(7))
    assert images.shape == (7, 3, 2, 2)
    assert images[0, :, 0, 0].tolist() == [255, 127, 127]
    assert images[1, :, 0, 0].tolist() == [100, 100, 100]
    assert images[2, :, 0, 0].tolist() == [77, 77, 77]
    assert images[3, :, 0, 0].tolist() == [10, 200, 30]
    assert images[4, :, 0, 0].tolist() == [255, 255, 255]
    assert images[5, 0].tolist() == [[0, 0], [0, 255]]
    assert images[6, :, 0, 0].tolist() == [0, 0, 255]


def test_mixed_sizes_are_resized_and_cropped_as_stated(tmp_path):
    for i, size in enumerate([(1, 1), (16, 8), (30, 40)]):
        picture(i, size=size).save(tmp_path / f"{i}.png")
    data = open_dataset(str(tmp_path), size=8)
    assert data.images(range(3)).shape == (3, 3, 8, 8)
    assert "8x8" in data.preparation
    assert "crop" in data.preparation
