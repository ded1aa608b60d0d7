"""Errors that speak: each says what was wrong, where, and what to do, and carries its exit code.

The command line prints the message on one line and ends with the code; a traceback is shown for a bug
of ours (code 1) and under --debug, and at no other time.
"""


class ReverieError(Exception):
    """Anything that a user can act on; the subclasses give the exit code.

    Example:
        >>> DataError("photos/cat.png: truncated; delete it or pass --on-bad skip").exit_code
        3
    """

    exit_code = 1


class UsageError(ReverieError, ValueError):
    """A wrong option, value or configuration."""

    exit_code = 2


class DataError(ReverieError):
    """Data that is missing, unreadable or not what it claims to be."""

    exit_code = 3


class ModelFileError(ReverieError):
    """A checkpoint or model file that is damaged, foreign or hostile."""

    exit_code = 4


class NonFiniteError(ReverieError, ArithmeticError):
    """NaN or infinity where a number was due."""

    exit_code = 5


class StorageError(ReverieError, OSError):
    """A disk that is full, read-only or gone."""

    exit_code = 6


class OutOfMemoryError(ReverieError, MemoryError):
    """More memory than there is."""

    exit_code = 7


class Stopped(ReverieError):  # noqa: N818 - it is no error
    """Stopped by a signal, with the state saved.

    Arguments:
        message: What was saved, and how to go on.
        signum: The signal's number: 2 (SIGINT) ends with 130, 15 (SIGTERM) with 143.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
