"""One run in a folder.

The lock is the system's own, held by an open file: it falls with its process, however that ends, so that no lock
is ever stale. What the file says, a number and a time, is for people; nothing is decided by it.

References:
    flock(2): a lock belongs to the open file, and a forked child shares it until it closes its copy
    https://man7.org/linux/man-pages/man2/flock.2.html
"""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from reverie.base.errors import UsageError
from reverie.base.storage import guarded, put

NAME = "run.lock"

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def take(file: BinaryIO) -> bool:
        """Lock an open file, or return False: another has it."""
        file.seek(1 << 30)  # far behind what the file says: a locked byte cannot be read there
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True
else:

    def take(file: BinaryIO) -> bool:
        """Lock an open file, or return False: another has it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


held: set[BinaryIO] = set()


def let_go() -> None:
    """Close this process's copies: a data worker that outlives its killed parent must not hold its lock."""
    for file in held:
        file.close()
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


class RunLock:
    """Holds a folder for one run.

    Arguments:
        folder: The run's folder, which exists.

    Raises:
        UsageError: On entry: another run holds it; the message says which, and since when.
        StorageError: On entry: the lock file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, RunLock(folder):
        ...     print(json.loads((Path(folder) / NAME).read_bytes())["pid"] == os.getpid())
        True
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self.file: BinaryIO | None = None

    def __enter__(self) -> "RunLock":
        with guarded(self.path):
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            try:
                if not take(file):
                    raise UsageError(self._refusal())
                self._sign(file)
            except BaseException:
                file.close()
                raise
        self.file = file
        held.add(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None or self.file.closed:  # a forked child has let go
            return
        held.discard(self.file)
        with suppress(OSError):  # a name left behind misleads nobody: the lock decides
            self.file.truncate(0)
        self.file.close()

    def _sign(self, file: BinaryIO) -> None:
        """Write who holds it."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.seek(0)
        put(file, json.dumps({"pid": os.getpid(), "since": since, "host": socket.gethostname()}).encode())

    def _refusal(self) -> str:
        """Return who holds it, and what to do."""
        holder = "another process"
        with suppress(OSError, ValueError, KeyError, TypeError):
            signed = json.loads(self.path.read_bytes())
            where = "" if signed["host"] == socket.gethostname() else f" on {signed['host']}"
            holder = f"pid {signed['pid']}{where} since {signed['since']}"
        return f"{self.folder} is in use by {holder}; wait until it ends, stop it, or choose another folder"
