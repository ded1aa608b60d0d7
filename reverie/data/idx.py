"""MNIST's IDX files, gzipped or not: a folder that holds them, or one images file.

An IDX file is a header of four bytes (two zeros, the type: 8 for bytes, the number of dimensions d), d
big-endian sizes of four bytes, and the numbers. The sizes are held against the file's own size, and for a
gzipped file against the size at its end and what its bytes can hold at most, before memory is taken. The
labels are looked for beside the images, in the file with "labels" for "images" in its name.

References:
    The MNIST database of handwritten digits (LeCun, Cortes & Burges)
    https://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from reverie.base.errors import DataError, UsageError
from reverie.data.arrays import ArrayImages
from reverie.data.options import Options

_BYTES = 0x08
_MAX_DEFLATE = 1032  # no byte of a gzip stream unpacks to more


def open_idx(argument: str, options: Options) -> ArrayImages:
    """Return the images of IDX files; of a folder with a training and a test set, the training set.

    Arguments:
        argument: A folder, or an images file.
        options: How to read it.

    Raises:
        UsageError: The path does not exist.
        DataError: A file is not what its header claims, or there are no images.
    """
    path = Path(argument).expanduser()
    if not argument or not path.exists():
        raise UsageError(f"{argument or 'idx:'}: no such folder or IDX file")
    images, notes = _images_file(path)
    pixels = read_idx(images, 3)
    labels = _labels_file(images)
    if labels is None:
        notes.append(f"no labels beside {images.name}")
    return ArrayImages(
        str(path), pixels[..., None], options, None if labels is None else read_idx(labels, 1), notes=notes
    )


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Return the array of an IDX file of bytes.

    Raises:
        DataError: It is none, has other dimensions, or its size is not the one its header claims.
    """
    try:
        with _open(path) as file:
            shape = _read_shape(file, path, dimensions)
            expected = math.prod(shape)
            _check_size(path, 4 + 4 * dimensions + expected)
            data = file.read(expected)
            more = file.read(1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: is cut off or damaged: {error}; get it again") from None
    if len(data) != expected or more:
        raise DataError(f"{path}: its header says {expected:,} bytes and there are {'more' if more else len(data)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open(path: Path) -> BufferedIOBase:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _read_shape(file: BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    zeros, kind, count = struct.unpack(">HBB", file.read(4))
    if zeros or kind != _BYTES:
        raise DataError(f"{path}: is no IDX file of bytes (it begins {zeros:#06x} {kind:#04x}, expected 0x0000 0x08)")
    if count != dimensions:
        raise DataError(f"{path}: has {count} dimensions, expected {dimensions}")
    return struct.unpack(f">{count}I", file.read(4 * count))


def _check_size(path: Path, expected: int) -> None:
    """Hold the size that a header claims against the file's, before memory is taken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        if zipped:
            file.seek(-4, 2)
            unpacked = int.from_bytes(file.read(4), "little")  # modulo 2^32
            wrong = unpacked != expected % 2**32 or expected > _MAX_DEFLATE * size
        else:
            unpacked, wrong = size, size != expected
    if wrong:
        raise DataError(f"{path}: its header claims {expected:,} bytes and it holds {unpacked:,}; get it again")


# Finding the files ----------------------------------------------------------------------------


def _images_file(path: Path) -> tuple[Path, list[str]]:
    """Return the images file to read, and what to say about those that are left."""
    if path.is_file():
        return path, []
    found = sorted(item for item in path.iterdir() if "images" in item.name and "ubyte" in item.name)
    if not found:
        raise DataError(f"{path}: has no IDX images file; looked for names such as train-images-idx3-ubyte.gz")
    training = [item for item in found if "train" in item.name] or found
    if len(training) > 1:
        raise DataError(f"{path}: has {', '.join(item.name for item in training)}; give the path of one")
    left = [item.name for item in found if item != training[0]]
    return training[0], [f"left out: {', '.join(left)}; give its path to use it"] if left else []


def _labels_file(images: Path) -> Path | None:
    """Return the file of the labels that belong to an images file, or None."""
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    bare = name.removesuffix(".gz")
    candidates = [images.with_name(candidate) for candidate in (name, bare, f"{bare}.gz")]
    return next((item for item in candidates if item.is_file() and item != images), None)
