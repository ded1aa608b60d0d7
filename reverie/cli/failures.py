"""Every way for a command to end, and its exit code: one place that turns errors into lines.

0 done    2 usage    3 data    4 model file    5 non-finite    6 storage    7 memory
130, 143 stopped by SIGINT, SIGTERM        1 a bug of ours, the only one to show a traceback unasked
"""

import errno
import re
import signal
import traceback
from typing import NamedTuple

import click

import reverie
from reverie.base.errors import ReverieError, Stopped
from reverie.base.registry import nearest
from reverie.cli.console import note, size
from reverie.cli.machine import available

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}
MEMORY = re.compile(r"can.?t allocate memory|cannot allocate memory|out of memory|bad_alloc|not enough memory", re.I)
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.I)


class Failure(NamedTuple):
    """How a command ends: its exit code, the lines for standard error, and whether to show where it broke."""

    code: int
    lines: list[str]
    traceback: bool = False


def explain(error: BaseException, command: click.Command | None = None) -> Failure:
    """Return how an error ends a command.

    Arguments:
        error: What was raised.
        command: The command it was raised in, which knows what takes less memory.

    Example:
        >>> from reverie.base.errors import DataError
        >>> explain(DataError("photos: no images; name a folder that has some"))
        Failure(code=3, lines=['photos: no images; name a folder that has some'], traceback=False)
    """
    if isinstance(error, ReverieError):
        return Failure(error.exit_code, str(error).splitlines())
    if isinstance(error, click.UsageError):
        return Failure(2, [usage(error)])
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Failure(130, ["stopped"])
    if is_memory(error):
        return Failure(7, [memory(error, getattr(command, "lower", ""))])
    if isinstance(error, BrokenPipeError):
        return Failure(0, [])  # the reader had all that it wanted
    if isinstance(error, OSError) and error.errno in STORAGE:
        return Failure(6, [storage(error)])
    kind = f"{type(error).__name__}: {error}".splitlines()[0]
    return Failure(
        1, [f"{kind}: this is a bug of reverie {reverie.__version__}; please report it with the lines above"], True
    )


def usage(error: click.UsageError) -> str:
    """Return what is wrong with a command line, the nearest option, and where the help is."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        message = f"there is no option {error.option_name}{nearest(error.option_name, names(error.ctx))}"
    path = error.ctx.command_path if error.ctx is not None else "reverie"
    return f"{message[0].lower()}{message[1:]}; see {path} --help"


def names(ctx: click.Context) -> list[str]:
    """Return all options of a command, by all their names."""
    parameters = [part for part in ctx.command.get_params(ctx) if isinstance(part, click.Option)]
    return [name for part in parameters for name in (*part.opts, *part.secondary_opts, *getattr(part, "aliases", ()))]


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, in whichever library's words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and MEMORY.search(str(error)) is not None


def memory(error: BaseException, lower: str) -> str:
    """Return how much memory was asked for, how much there is, and what takes less."""
    asked = ASKED.search(str(error))
    wanted = f": {amount(asked)} more were asked for" if asked else ""
    free = available()
    there = f"{'' if wanted else ':'}{', ' if wanted else ' '}{size(free)} are free" if free else ""
    return f"not enough memory{wanted}{there}; {f'lower {lower}' if lower else 'close other programs'}"


def amount(asked: re.Match[str]) -> str:
    """Return the amount in an allocator's complaint for reading."""
    scale = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}[asked[2].lower()]
    return size(float(asked[1]) * scale)


def storage(error: OSError) -> str:
    """Return which file could not be written, and why."""
    reason = error.strerror or str(error)
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
    return f"{error.filename or 'writing failed'}: {reason}; {remedy}"


def report(failure: Failure, error: BaseException, debug: bool) -> None:
    """Print the lines on standard error; a traceback first, for a bug or where it was asked for."""
    if failure.traceback or debug:
        note("".join(traceback.format_exception(error)).rstrip())
    stopped = isinstance(error, KeyboardInterrupt | Stopped)
    for line in failure.lines:
        note(line if stopped else f"error: {line}")


def terminated(signum: int, frame: object) -> None:
    """End the command as SIGINT would, with SIGTERM's code."""
    raise Stopped("stopped", signal.SIGTERM)
