"""Pictures on a disk: numbered, never overwritten, all or none; sheets and animations."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.base import storage
from reverie.base.errors import NonFiniteError, StorageError, UsageError
from reverie.models import pictures
from reverie.models.model import Samples
from reverie.models.pictures import animation, frame, grid_picture, picture_bytes, write_new, write_pictures
from reverie.models.sampling import Intermediate


def pixels(path) -> torch.Tensor:
    """Return a grey picture's pixels (H, W)."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy())


def test_files_are_numbered_on_and_say_their_seed(model, tmp_path):
    out = tmp_path / "a" / "out"
    first = write_pictures(model.sample(3, seed=5, steps=1), out)
    assert [path.name for path in first] == ["00000-seed5.png", "00001-seed6.png", "00002-seed7.png"]
    before = [path.read_bytes() for path in first]
    (out / "00041-seed1.png").write_bytes(b"mine")
    (out / "notes.txt").write_bytes(b"mine")
    second = write_pictures(model.sample(2, seed=2**63 - 2, steps=1), out)
    assert [path.name for path in second] == [f"00042-seed{2**63 - 2}.png", f"00043-seed{2**63 - 1}.png"]
    assert [path.read_bytes() for path in first] == before
    assert (out / "00041-seed1.png").read_bytes() == b"mine"
    assert len(list(out.iterdir())) == 7


def test_the_pixels_are_the_samples(model, tmp_path):
    samples = model.sample(2, steps=2)
    for path, image in zip(write_pictures(samples, tmp_path), samples.uint8, strict=True):
        assert torch.equal(pixels(path), image[0])


def test_the_same_sample_is_the_same_file_whatever_its_batch(classy, tmp_path):
    """The PNG's bytes, its record among them."""
    settings = {"classes": "one", "guidance": 2.0, "steps": 2}
    one = write_pictures(classy.sample(1, seed=9, **settings), tmp_path / "one")[0]
    many = write_pictures(classy.sample(7, seed=6, batch_size=2, **settings), tmp_path / "many")[3]
    assert one.read_bytes() == many.read_bytes()


def test_another_writer_at_the_same_time(model, tmp_path, monkeypatch):
    """A number that is taken between the look and the write is passed over."""
    samples = model.sample(2, seed=0, steps=1)
    (tmp_path / "00000-seed0.png").write_bytes(b"theirs")
    monkeypatch.setattr(pictures, "next_number", lambda folder: 0)
    assert [path.name for path in write_pictures(samples, tmp_path)] == ["00001-seed0.png", "00002-seed1.png"]
    assert (tmp_path / "00000-seed0.png").read_bytes() == b"theirs"


def test_a_file_system_without_links(model, tmp_path, monkeypatch):
    def link(*given):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    samples = model.sample(1, steps=1)
    paths = write_pictures(samples, tmp_path) + write_pictures(samples, tmp_path)
    assert [path.name for path in paths] == ["00000-seed0.png", "00001-seed0.png"]
    assert torch.equal(pixels(paths[1]), samples.uint8[0, 0])
    with pytest.raises(UsageError, match="is there already"):
        write_new(paths[0], b"x")


def test_numbers_that_are_none_make_no_file_and_no_folder(model, tmp_path):
    """Exit code 5; never a black picture."""
    samples = model.sample(2, steps=1)
    samples.images[1, 0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteError):
        write_pictures(samples, tmp_path / "out")
    with torch.no_grad():
        next(model.denoiser.network.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        write_pictures(model.sample(1, steps=2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        write_pictures(model.sample(1, steps=1), tmp_path / "out")


def test_points_are_no_pictures(tmp_path):
    with pytest.raises(UsageError, match="no pictures"):
        write_pictures(Samples(torch.zeros(1, 2), torch.arange(1), None, {}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_whole(model, tmp_path, monkeypatch):
    samples, written, put = model.sample(3, steps=1), [], storage.put

    def full(file, data):
        written.append(1)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        put(file, data)

    monkeypatch.setattr(storage, "put", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        write_pictures(samples, tmp_path)
    assert caught.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["00000-seed0.png"]
    assert torch.equal(pixels(tmp_path / "00000-seed0.png"), samples.uint8[0, 0])


# Sheets and animations ------------------------------------------------------------------------------


def test_a_sheet_shows_each_picture_in_its_place():
    images = torch.arange(6, dtype=torch.uint8).mul(40).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    sheet = np.asarray(grid_picture(images, columns=4, scale=2))
    assert sheet.shape == (4 + 2 * 20, 4 + 4 * 20, 3)
    for i in range(6):
        top, left = 4 + i // 4 * 20, 4 + i % 4 * 20
        assert (sheet[top : top + 16, left : left + 16] == 40 * i).all()
    assert (sheet[:4] == 255).all()


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert grid_picture(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).size == (64, 64)
    assert grid_picture(torch.zeros(4, 3, 128, 128, dtype=torch.uint8)).size == (268, 268)


def test_labels_are_written_below():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    plain, labelled = (np.asarray(grid_picture(images, labels=labels)) for labels in (["", ""], ["7", ""]))
    below = labelled[4 + 56 :]
    assert (below[:, :60] < 128).any()
    assert (below[:, 64:] == 255).all()
    assert (plain[4 + 56 :] == 255).all()
    grid_picture(images, labels=["a name that is far too long for its cell", "ünï"])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_kinds_of_pictures_have_a_sheet(channels):
    assert grid_picture(torch.full((3, channels, 4, 4), 200, dtype=torch.uint8)).mode == "RGB"


@pytest.mark.parametrize(("labels", "columns", "words"), [(["a"], None, "1 labels for 2"), (None, 0, "0 columns")])
def test_a_sheet_that_cannot_be(labels, columns, words):
    with pytest.raises(UsageError, match=words):
        grid_picture(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), columns, labels)


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_the_denoising_moves(model, tmp_path, ending):
    samples = model.sample(4, steps=6, intermediates=5)
    path = animation(samples.intermediates, tmp_path / f"a{ending}")
    with Image.open(path) as film:
        assert film.n_frames == 5
        film.seek(4)
        last = np.asarray(film.convert("RGB"), int)
    assert np.abs(last - np.asarray(grid_picture(samples.uint8), int)).max() <= (0 if ending == ".webp" else 8)
    with pytest.raises(UsageError, match="is there already"):
        animation(samples.intermediates, path)


@pytest.mark.parametrize(
    ("name", "kept", "words"), [("a.mp4", 2, "is a .gif or a .webp"), ("a.gif", 0, "nothing to animate")]
)
def test_an_animation_that_cannot_be(model, tmp_path, name, kept, words):
    with pytest.raises(UsageError, match=words):
        animation(model.sample(1, steps=2, intermediates=kept).intermediates, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_noise_of_any_size_is_shown():
    """At sigma = 80 a state is 80 times too bright; its frame is not."""
    x = 80 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = frame(Intermediate(1, 1.0, x, x)).float()
    assert 60 < shown.std() < 110


def test_bytes_of_a_picture_are_the_same_every_time():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    assert picture_bytes(image) == picture_bytes(image)
    assert picture_bytes(image, {"a": "ü"}) != picture_bytes(image)
