"""What a command says: results on standard output, progress and notes on standard error."""

import json
import math
import os
import sys
from typing import Any, TextIO

import click


def result(text: str) -> None:
    """Print a result on standard output."""
    click.echo(printable(text), color=colour())


def note(text: str) -> None:
    """Print what the user may want to know, on standard error; nobody there to read it is no reason to fail."""
    try:
        click.echo(reddened(printable(text)), err=True, color=colour())
    except (OSError, ValueError):
        abandon(sys.stderr)


def reddened(text: str) -> str:
    """Return a line that says `error:` with that word in red."""
    return click.style("error:", fg="red") + text[6:] if text.startswith("error:") else text


def emit(value: Any) -> None:
    """Print one JSON object on standard output; numbers that JSON has no word for become null."""
    click.echo(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """Return a value as strict JSON holds it.

    Example:
        >>> finite({"loss": float("nan"), "sizes": (1, 2)})
        {'loss': None, 'sizes': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def printable(text: str) -> str:
    r"""Return text whose control characters are written out: a file's name must not steer the terminal.

    Example:
        >>> printable("cat\x1b[2J.png")
        'cat\\x1b[2J.png'
    """
    keep = "\n\t"
    return "".join(c if c in keep or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else f"\\x{ord(c):02x}" for c in text)


def colour() -> bool | None:
    """Whether to colour: never where NO_COLOR is set, else as click decides by the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def size(count: float) -> str:
    """Return a number of bytes for reading.

    Example:
        >>> size(512), size(3 * 2**30)
        ('512 B', '3.0 GiB')
    """
    unit = 0
    while abs(count) >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit - 1]}"


def abandon(stream: TextIO) -> None:
    """Point a stream's descriptor at nothing, so that Python's last flush cannot fail either."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError):  # not a real file: a test's buffer, or closed already
        pass


def drop_unread(stream: TextIO) -> None:
    """Flush a stream; what nobody reads any more is dropped without a word."""
    try:
        stream.flush()
    except (OSError, ValueError):
        abandon(stream)


def interactive() -> bool:
    """Whether somebody watches standard error."""
    return bool(getattr(sys.stderr, "isatty", lambda: False)())
