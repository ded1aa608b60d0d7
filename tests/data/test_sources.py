"""Digits, IDX and npz files, the hub: by name or by content."""

import gzip
import struct

import numpy as np
import pytest
import torch

from reverie.base.errors import DataError, UsageError
from reverie.data import open_dataset


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (12, 6, 5)), np.arange(12) % 3


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    real, digits = load_digits(), open_dataset("digits")
    images = digits.images(range(len(digits))).squeeze(1).numpy()
    assert np.array_equal(images, np.rint(real.images * 255 / 16).astype(np.uint8))
    assert np.array_equal(digits.labels(range(len(digits))).numpy(), real.target)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_with_their_labels(tmp_path, arrays, packed):
    images, labels = arrays
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        data = idx(array)
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    data = open_dataset(str(tmp_path))
    assert data.shape == (1, 6, 5)
    assert np.array_equal(data.images(range(12)).squeeze(1).numpy(), images)
    assert data.labels(range(12)).tolist() == labels.tolist()


def test_an_idx_header_that_lies_takes_no_memory(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 2**31 - 1, 4096, 4096) + b"\0" * 100)
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_dataset(str(tmp_path))


def test_labels_of_another_number_are_refused(tmp_path, arrays):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(arrays[0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(arrays[1][:5]))
    with pytest.raises(DataError, match="5"):
        open_dataset(str(tmp_path))


def test_npz_with_labels(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", images=arrays[0].astype(np.uint8), labels=arrays[1])
    data = open_dataset(str(tmp_path / "data.npz"))
    assert np.array_equal(data.images(range(12)).squeeze(1).numpy(), arrays[0])
    assert data.classes == ("0", "1", "2")


def test_an_npz_that_holds_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"evil\.npz"):
        open_dataset(str(tmp_path / "evil.npz"))


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UsageError, match="digits"):
        open_dataset("digit")


def test_a_data_set_of_the_hub_from_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (200, 0, 0) if name == "cat" else (0, 0, 200)).save(tmp_path / name / "0.png")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    data = open_dataset("hub:someone/pets:train")
    assert data.classes == ("cat", "dog")
    assert sorted(data.images([0, 1])[:, 0, 0, 0].tolist()) == [0, 200]


def test_without_the_library_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'reverie\[hub\]'"):
        open_dataset("hub:someone/pets")


def test_grey_data_becomes_rgb_when_asked():
    images = open_dataset("digits", channels=3).images([0])
    assert images.shape == (1, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
