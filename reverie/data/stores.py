"""Where files lie: a folder, a tar, a zip; listed by name and read whole, nothing unpacked to disk.

A name is relative to the source's root, with forward slashes, and the same whether the files lie in a folder
or in an archive of it. A name in an archive that would lead out of the root ends the reading.
"""

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from reverie.base.errors import DataError
from reverie.data.decode import MAX_BYTES, BadImage

_ZIP_ERRORS = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_MAX_RATIO = 500


@runtime_checkable
class Store(Protocol):
    """Something that files are read from."""

    def read(self, place: Any) -> bytes:
        """Return a whole file.

        Raises:
            BadImage: It can't be read.
        """


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source.

    Arguments:
        name: Relative to the source's root.
        path: Where it is, for messages.
        store: What reads it.
        place: Where the store finds it.
    """

    name: str
    path: str
    store: Store
    place: Any

    def read(self) -> bytes:
        """Return the whole file.

        Raises:
            BadImage: It can't be read.
        """
        return self.store.read(self.place)


def open_store(path: Path) -> list[Entry]:
    """List the files of a folder, a tar or a zip, by name.

    Raises:
        DataError: It can't be listed, is cut off, or has a name that leads out of it.
    """
    if path.is_dir():
        entries: Iterable[Entry] = list_folder(path)
    elif zipfile.is_zipfile(path):
        entries = list_zip(path)
    else:
        entries = list_tar(path)
    return sorted(entries, key=lambda entry: entry.name)


def is_hidden(name: str) -> bool:
    """Return whether a file is one that systems leave behind: .name, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def inside(name: str, where: str) -> str:
    """Return a relative name without its "./", refusing one that leads out of the root.

    Raises:
        DataError: It is absolute, has "..", a drive, a backslash or a NUL in it.

    Example:
        >>> inside("./cats/1.png", "photos.tar")
        'cats/1.png'
    """
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in "".join(parts[:1]):
        raise DataError(f"{where}: the name {name!r} leads out of it; nothing was read or written there")
    return "/".join(parts)


# A folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """Reads files that lie on the disk."""

    def read(self, place: str) -> bytes:
        """Return the file at a path, unless it is larger than an image may be."""
        try:
            if os.stat(place).st_size > MAX_BYTES:
                raise BadImage(f"more than the {MAX_BYTES:,} bytes that an image may have")
            with open(place, "rb") as file:
                return file.read(MAX_BYTES)
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from None


def list_folder(root: Path) -> Iterator[Entry]:
    """List a folder and those in it, following links but no folder twice."""
    disk, seen, waiting = Disk(), {os.path.realpath(root)}, [""]
    while waiting:
        folder = waiting.pop()
        for item in _scan(root / folder):
            name = f"{folder}{item.name}"
            if item.is_dir():
                real = os.path.realpath(item.path)
                if real not in seen and not is_hidden(item.name):
                    seen.add(real)
                    waiting.append(f"{name}/")
            elif not is_hidden(item.name):
                yield Entry(name, item.path, disk, item.path)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError as error:
        raise DataError(f"{folder}: can't be listed: {error.strerror or error}") from None


# A tar ----------------------------------------------------------------------------------------


class Tar:
    """Reads the members of an uncompressed tar by their place in it; any number of threads at once."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - open as long as the data set is

    def read(self, place: tuple[int, int] | str) -> bytes:
        """Return the bytes at (offset, size); a string says why there are none."""
        if isinstance(place, str):
            raise BadImage(place)
        offset, size = place
        if size > MAX_BYTES:
            raise BadImage(f"{size:,} bytes, more than the {MAX_BYTES:,} that an image may have")
        try:
            data = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from None
        if len(data) < size:
            raise BadImage(f"truncated: {len(data):,} of {size:,} bytes are there")
        return data

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def list_tar(path: Path) -> list[Entry]:
    """List the files of a tar; of two with one name the later counts, as it does when unpacked."""
    store = Tar(path)
    entries = {}
    for member in _tar_members(path):
        name = inside(member.name, str(path))
        if member.isdir() or is_hidden(name):
            continue
        place: Any = (member.offset_data, member.size)
        if not member.isreg() or member.issparse():
            place = "a link or special file in an archive, which is not followed"
        entries[name] = Entry(name, f"{path}/{name}", store, place)
    return list(entries.values())


def _tar_members(path: Path) -> list[tarfile.TarInfo]:
    """Return the members of a whole tar: one that ends before its end mark is cut off."""
    size = path.stat().st_size
    cut_off = f"{path}: the archive is cut off or damaged ({size:,} bytes are there); get it again"
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{cut_off}: {error}") from None
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or mark.strip(b"\0"):
        raise DataError(f"{cut_off}: no end mark at byte {end:,}")
    return members


# A zip ----------------------------------------------------------------------------------------


class Zip:
    """Reads the members of a zip; zipfile's own lock lets threads share it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def read(self, place: zipfile.ZipInfo) -> bytes:
        """Return a member, after its claims were held against the limits."""
        if stat.S_ISLNK(place.external_attr >> 16):
            raise BadImage("a link in an archive, which is not followed")
        if place.flag_bits & 1:
            raise BadImage("encrypted; unpack the archive with its password")
        if place.file_size > MAX_BYTES or place.file_size > _MAX_RATIO * (place.compress_size + 1024):
            raise BadImage(f"decompression bomb: {place.file_size:,} bytes packed into {place.compress_size:,}")
        try:
            return self.archive.read(place)
        except _ZIP_ERRORS as error:
            raise BadImage(f"damaged in the archive: {error}") from None


def list_zip(path: Path) -> list[Entry]:
    """List the files of a zip; of two with one name the later counts, as it does when unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise DataError(f"{path}: the archive is cut off or damaged: {error}; get it again") from None
    store = Zip(archive)
    entries = {}
    for info in archive.infolist():
        name = inside(info.filename, str(path))
        if not info.is_dir() and not is_hidden(name):
            entries[name] = Entry(name, f"{path}/{name}", store, info)
    return list(entries.values())
