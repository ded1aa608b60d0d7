"""Arrays of images in an .npz file, read without pickle.

The images are the array called images, x, x_train or arr_0, or the only one with three dimensions or more;
the labels labels, label, y, y_train or arr_1; captions captions or text. Images are (N, H, W), (N, H, W, C)
or (N, C, H, W) with C = 1, 3 or 4; uint8 from 0 to 255, bool, or floats: in [0, 1] by round(255 v), in
[-1, 1], where any is below 0, by round(255 (v + 1) / 2); anything else is refused. An array's size is held
against the file's before memory is taken.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from reverie.base.errors import DataError, UsageError
from reverie.data.arrays import ArrayImages
from reverie.data.options import Options

IMAGES = ("images", "x", "x_train", "arr_0")
LABELS = ("labels", "label", "y", "y_train", "arr_1")
CAPTIONS = ("captions", "text")
_CHANNELS = (1, 3, 4)
_FREE_BYTES = 256 << 20
_MAX_RATIO = 500


def open_npz(argument: str, options: Options) -> ArrayImages:
    """Return the images of an .npz file, with its labels and captions.

    Arguments:
        argument: The path.
        options: How to read it.

    Raises:
        UsageError: The path does not exist.
        DataError: It is no .npz, holds no images, or holds what can't be read safely.
    """
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise UsageError(f"{argument or 'npz:'}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {info.filename.removesuffix(".npy"): _shape(archive, info, path) for info in archive.infolist()}
            names = _choose(shapes, path)
            arrays = {kind: _read(archive, name, path) for kind, name in names.items()}
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path}: is no .npz, or a damaged one: {error}") from None
    left = [name for name in shapes if name not in names.values()]
    notes = [f"arrays that are not read: {', '.join(left)}"] if left else []
    labels, captions = arrays.get("labels"), arrays.get("captions")
    return ArrayImages(
        str(path),
        _channels_last(_to_bytes(arrays["images"], path), path),
        options,
        None if labels is None else _class_numbers(labels, path),
        None if captions is None else _texts(captions, path),
        notes,
    )


# Reading --------------------------------------------------------------------------------------


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[int, ...]:
    """Return an array's shape, with its claims held against the file."""
    with archive.open(info) as file:
        shape, dtype = _read_header(file)
        start = file.tell()
    where = f"{path}: array {info.filename.removesuffix('.npy')!r}"
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects (a pickle), which are never loaded; save it as numbers")
    expected = math.prod(shape) * dtype.itemsize
    if start + expected != info.file_size:
        raise DataError(f"{where} claims {expected:,} bytes and holds {info.file_size - start:,}")
    if expected > max(_FREE_BYTES, _MAX_RATIO * info.compress_size):
        raise DataError(f"{where}: decompression bomb: {expected:,} bytes packed into {info.compress_size:,}")
    return shape


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _choose(shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, str]:
    """Return which array holds the images, which the labels, which the captions."""
    many = [name for name, shape in shapes.items() if len(shape) >= 3]
    images = next((name for name in IMAGES if name in shapes), many[0] if len(many) == 1 else None)
    if images is None:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise DataError(f"{path}: no array called {', '.join(IMAGES)}; found {found}; call the images 'images'")
    chosen = {"images": images}
    for kind, names in (("labels", LABELS), ("captions", CAPTIONS)):
        for name in names:
            if name in shapes and kind not in chosen:
                chosen[kind] = name
    return chosen


# Checking -------------------------------------------------------------------------------------


def _to_bytes(array: np.ndarray, path: Path) -> UInt8[np.ndarray, "..."]:
    """Bring pixels to 0..255 by the rule above."""
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8, copy=False)
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    low, high = array.min(), array.max()
    if array.dtype.kind != "f" or not (low >= -1 and high <= 1):  # a NaN fails too
        raise DataError(
            f"{path}: the images are {array.dtype} from {low} to {high}; save them as uint8, or as floats "
            "in [0, 1] or [-1, 1]"
        )
    pixels = np.empty(array.shape, np.uint8)
    for row, image in enumerate(array):  # one at a time: no second copy of all in floats
        pixels[row] = np.rint((image + 1) * 127.5 if low < 0 else image * 255.0)
    return pixels


def _channels_last(array: UInt8[np.ndarray, "..."], path: Path) -> UInt8[np.ndarray, "n h w c"]:
    """Return the images as (N, H, W, C)."""
    if array.ndim == 3:
        return array[..., None]
    first, last = (array.ndim == 4 and array.shape[axis] in _CHANNELS for axis in (1, 3)) if array.ndim == 4 else (0, 0)
    if first == last:
        why = "could have its channels first or last" if first else "is no set of images"
        raise DataError(
            f"{path}: an array of shape {array.shape} {why}; save it as (N, H, W) or (N, H, W, C), C 1, 3 or 4"
        )
    return array if last else array.transpose(0, 2, 3, 1)


def _class_numbers(labels: np.ndarray, path: Path) -> np.ndarray:
    """Return the labels as (N,): whole numbers or names."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iuUb":
        raise DataError(
            f"{path}: the labels are {labels.dtype} of shape {labels.shape}, expected (N,) whole numbers or names"
        )
    return labels


def _texts(captions: np.ndarray, path: Path) -> list[str]:
    if captions.ndim != 1 or captions.dtype.kind != "U":
        raise DataError(f"{path}: the captions are {captions.dtype} of shape {captions.shape}, expected (N,) texts")
    return [str(text) for text in captions]
