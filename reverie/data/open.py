"""From what a user wrote after --data to a data set."""

import gzip
import os
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from reverie.base.errors import DataError, UsageError
from reverie.base.registry import nearest
from reverie.data.dataset import Dataset
from reverie.data.options import Options
from reverie.data.registry import sources

_IDX_MAGIC = b"\0\0\x08"
_TAR_MAGIC = b"ustar"


def open_dataset(
    spec: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    on_bad: Literal["refuse", "skip"] = "refuse",
    max_bad: float = 0.01,
    limit: int | None = None,
    cache: int = 1 << 30,
) -> Dataset:
    """Open a source of images, looking at every file once.

    Arguments:
        spec: A source by name, with its argument behind a colon ("digits", "shapes:64,count=1000",
            "hub:owner/name"), or a path whose content tells what it is. A name goes before a path of that
            name: for a folder called digits write ./digits.
        size: The side of the square images, or (H, W); by default chosen from the data.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default 1 where all images are grey, else 3.
        on_bad: "refuse": more unreadable files than max_bad are an error; "skip": any number short of all.
        max_bad: The fraction of the files that may be left out under "refuse".
        limit: At most this many samples, spread evenly over the source.
        cache: Bytes that decoded images may take in memory; what needs more is decoded on demand.

    Raises:
        UsageError: There is no such source or path, or an option lies outside its range.
        DataError: There are no images, or too many can't be read.

    Example:
        >>> open_dataset("shapes:16,count=10", channels=1).shape
        (1, 16, 16)
    """
    options = Options(size, channels, on_bad, max_bad, limit, cache)
    kind, argument = find_source(os.fspath(spec))
    dataset = sources[kind](argument, options)
    dataset.name = os.fspath(spec)
    return dataset


def find_source(spec: str) -> tuple[str, str]:
    """Return (source, argument) for what a user wrote.

    Raises:
        UsageError: There is no such source or path.
        DataError: It is a file that no source reads.

    Example:
        >>> find_source("shapes:32,count=5")
        ('shapes', '32,count=5')
    """
    head, _, argument = spec.partition(":")
    if head in sources:
        return head, argument
    path = Path(spec).expanduser()
    if not spec or "\0" in spec or not path.exists():
        known = ", ".join(sources)
        raise UsageError(f"{spec!r} is no file or folder, and no data source{nearest(head, sources)} (known: {known})")
    if path.is_dir():
        return ("idx" if any(map(_looks_idx, _files_of(path))) else "folder"), str(path)
    return _kind_of_file(path), str(path)


def _files_of(path: Path) -> list[Path]:
    try:
        return [item for item in path.iterdir() if "ubyte" in item.name and item.is_file()]
    except OSError as error:
        raise DataError(f"{path}: can't be listed: {error.strerror or error}") from None


def _looks_idx(path: Path) -> bool:
    """Return whether a file, gzipped or not, begins as an IDX file of bytes does."""
    try:
        return _start(path).startswith(_IDX_MAGIC)
    except (OSError, EOFError, zlib.error):
        return path.name.endswith((".gz", "ubyte"))  # named as one and damaged: the reader says how


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(path, "rb") as file:
            return file.read(512)
    return start


def _kind_of_file(path: Path) -> str:
    """Return which source reads a file, by its content."""
    try:
        start = _start(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "folder"
    if start.startswith(_IDX_MAGIC):
        return "idx"
    if start[257:262] == _TAR_MAGIC and not path.name.endswith(("gz", "bz2", "xz")):
        return "folder"
    if path.suffix in (".zip", ".tar", ".npz"):
        raise DataError(f"{path}: is no {path.suffix[1:]}, or one that is cut off or damaged; get it again")
    raise DataError(
        f"{path}: is no data set; give a folder, a .zip or .tar of images (a .tar.gz has to be unpacked, "
        "as it can't be read at random), an .npz or an IDX file"
    )
