"""Stopping a run by a signal, between two steps.

The first SIGINT or SIGTERM asks: the loop looks at the request between steps, saves, and ends. A SIGINT after that
insists: the run ends at once, though never inside a save. SIGHUP, which a closed terminal sends, is noted only.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from reverie.base.errors import Stopped


class StopRequest:
    """Listens for signals while its block runs; previous handlers come back at its end.

    Outside the main thread, where Python hears no signals, it installs nothing; `request` works everywhere.

    Attributes:
        signum: The signal that asked to stop, or None. `bool(stop)` says whether one did.
        notes: What to tell the user at the next quiet moment; a handler must not print.

    Raises:
        Stopped: On leaving, after a second SIGINT.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     print(bool(stop), int(stop.signum))
        True 2
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.notes: list[str] = []
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._saves = 0
        self._insisted = False

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGINT, self._ask)
            self._listen(signal.SIGTERM, self._ask)
            if hasattr(signal, "SIGHUP"):  # not on Windows
                self._listen(signal.SIGHUP, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: not Python's own
        self._previous.clear()
        if self._insisted and isinstance(error, KeyboardInterrupt):
            message = "stopped at once by a second interrupt; the last saved checkpoint is whole: go on with --resume"
            raise Stopped(message, signal.SIGINT) from error

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Ask to stop, as a signal would; the first one to ask is remembered."""
        self.signum = self.signum or int(signum)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Keep a second SIGINT waiting until the block has ended."""
        self._saves += 1
        try:
            yield
        finally:
            self._saves -= 1
            if self._insisted and not self._saves:
                raise KeyboardInterrupt

    def _listen(self, signum: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._previous[signum] = signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self and signum == signal.SIGINT:
            self._insisted = True
            if not self._saves:
                raise KeyboardInterrupt
        self.request(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.notes.append("the terminal is gone (SIGHUP); the run goes on")
