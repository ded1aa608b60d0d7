"""Writing that either happened or did not.

A file is written beside its place, flushed, fsynced, renamed into place, and the folder is fsynced:

    put -> flush -> fsync(file) -> rename -> fsync(folder),

so that a reader sees the old file or the new one whole, whenever the process is killed or the power fails.
Every byte goes through `put`, every rename through `rename`, every deletion of a folder through `remove_folder`:
a test that replaces one of them fills the disk, or breaks it, wherever it likes. What the system refuses comes
out as one StorageError: path, bytes, what to do.

References:
    All File Systems Are Not Created Equal: On the Complexity of Crafting Crash-Consistent Applications
    (Pillai et al., 2014)
    https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai
"""

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

from reverie.base.errors import StorageError

CHUNK = 1 << 22  # bytes handed over at a time: large enough to be fast, small enough to hash in cache
PROBE = 1 << 16

ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "the limit on file size is too small: raise it (ulimit -f) or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.ENOENT: "the folder is gone: is its disk still mounted?",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EIO: "the disk reports a fault: check it, and choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


# What a disk can do ---------------------------------------------------------------------------


@runtime_checkable
class Sink(Protocol):
    """An open file, as far as writing needs one."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take some of the data, and return how many bytes."""


def put(file: Sink, data: bytes | memoryview) -> None:
    """Write all of the data to an open file: the one place where bytes leave for a disk."""
    rest = memoryview(data)
    while rest:
        # An unbuffered file may take a part only.
        rest = rest[file.write(rest) :]


def rename(source: Path, target: Path) -> None:
    """Rename a file (over another one) or a folder, in one step."""
    os.replace(source, target)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it."""
    shutil.rmtree(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; the contents of a file are its own affair."""
    if os.name == "nt":  # a folder cannot be opened there, and its names are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk that holds a path, existing or not; None where it does not say."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def alive(pid: int) -> bool:
    """Return whether a process of this machine is there.

    Example:
        >>> alive(os.getpid()), alive(2**40)
        (True, False)
    """
    if os.name == "nt":  # os.kill(pid, 0) would end it there
        import ctypes

        kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
        if handle := kernel.OpenProcess(0x1000, False, pid):
            kernel.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


# Errors that speak ----------------------------------------------------------------------------


def size(count: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> size(532), size(23_456_789)
        ('532 bytes', '23.5 MB')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def storage_error(error: OSError, path: Path, needed: int | None = None) -> StorageError:
    """Return the error that says what could not be written, where, and what to do.

    Arguments:
        error: What the system said.
        path: What was to be written.
        needed: How many bytes that takes, if known.

    Example:
        >>> error = storage_error(OSError(errno.EROFS, "Read-only file system"), Path("/media/run"))
        >>> str(error).partition(" (")[0], error.exit_code
        ('cannot write /media/run: read-only file system', 6)
    """
    free = free_bytes(path)
    facts = [] if needed is None else [f"{size(needed)} needed"]
    facts += ["free space unknown" if free is None else f"{size(free)} free"]
    cause = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
    cause = cause[:1].lower() + cause[1:]
    advice = ADVICE.get(error.errno or 0, "choose another folder")
    return StorageError(f"cannot write {path}: {cause} ({', '.join(facts)}); {advice}")


@contextmanager
def guarded(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the system refuses inside the block into a StorageError about a path.

    Raises:
        StorageError: An OSError was raised inside; it is the cause.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, path, needed) from error


# Files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """What was written: its length, crc32 (fast, finds a flipped bit) and sha256 (slow, names the content)."""

    bytes: int
    crc32: str
    sha256: str | None


class Tally:
    """Sums up pieces of bytes, one after the other.

    Arguments:
        thorough: Whether to compute the sha256 too, which without a processor's help takes ten times as long.

    Example:
        >>> tally = Tally()
        >>> tally.add(b"dig"), tally.add(b"its")
        (None, None)
        >>> tally.digest().bytes, tally.digest().crc32
        (6, 'd52d5ab2')
    """

    def __init__(self, thorough: bool = True) -> None:
        self.length, self.crc, self.sha = 0, 0, sha256() if thorough else None

    def add(self, piece: bytes | memoryview) -> None:
        """Sum up one more piece."""
        self.length, self.crc = self.length + len(piece), zlib.crc32(piece, self.crc)
        if self.sha is not None:
            self.sha.update(piece)

    def digest(self) -> Digest:
        """Return the digest of all pieces so far."""
        return Digest(self.length, f"{self.crc:08x}", None if self.sha is None else self.sha.hexdigest())


def file_digest(path: Path, thorough: bool = True) -> Digest:
    """Return the digest of a file as it is on the disk."""
    tally = Tally(thorough)
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            tally.add(piece)
    return tally.digest()


class Writer:
    """An open file that sums up what it is given: what left here, not what can be read back.

    Arguments:
        file: Open for writing bytes.
    """

    def __init__(self, file: Sink) -> None:
        self.file = file
        self.tally = Tally()

    def write(self, data: bytes | memoryview) -> None:
        """Write and sum up; a memoryview is one of single bytes."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            put(self.file, piece)
            self.tally.add(piece)


def write_synced(path: Path, content: bytes | Callable[[Writer], None]) -> Digest:
    """Write a file in place and fsync it: for a folder that nobody reads yet.

    Arguments:
        path: The file.
        content: Its bytes, or a function that writes them.

    Returns:
        What was written.

    Raises:
        OSError: As the system says it; the caller knows what the user calls the place.
    """
    with path.open("wb") as file:
        writer = Writer(file)
        if isinstance(content, bytes):
            writer.write(content)
        else:
            content(writer)
        file.flush()
        os.fsync(file.fileno())
    return writer.tally.digest()


def write_file(path: Path | str, content: bytes | Callable[[Writer], None], needed: int | None = None) -> Digest:
    """Write a file atomically: after a crash the old one is there, or the new one, whole.

    Arguments:
        path: The file; its folder exists.
        content: Its bytes, or a function that writes them.
        needed: How many bytes the function will write, for the error message.

    Returns:
        What was written.

    Raises:
        StorageError: The disk is full, read-only, gone or faulty; the old file is untouched, nothing is left beside it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_file(Path(folder) / "config.json", b"{}").bytes
        2
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with guarded(path, len(content) if isinstance(content, bytes) else needed):
        try:
            digest = write_synced(beside, content)
            rename(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return digest


def probe(folder: Path | str) -> None:
    """Find out before step 1 whether a folder can be saved into: make it, and do there what a save does.

    A permission bit or a figure of free space only promises; the write knows.

    Raises:
        StorageError: It cannot; folders that were made to find out are gone again.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    before, after = folder / f".probe-{os.getpid()}", folder / f".probed-{os.getpid()}"

    def clear() -> None:
        for trial in (before, after):  # also what a killed process of the same number left: containers reuse them
            shutil.rmtree(trial, ignore_errors=True)

    with guarded(folder, PROBE):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear()
            before.mkdir()
            with (before / "probe").open("wb") as file:
                put(file, bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())
            rename(before, after)
            sync_folder(folder)
            remove_folder(after)
        except BaseException:
            clear()
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise
