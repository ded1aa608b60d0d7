"""Configuration files: TOML or JSON, plain values, bounded before they are read.

A file names settings and gives them values; nothing in it is imported, called or expanded. YAML is not
read at all: what it adds to TOML (tags, anchors, aliases) is what has let files run code and eat memory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reverie.base.errors import UsageError

MOST_BYTES = 16 * 1024
MOST_DEPTH = 8
MOST_BITS = 512
MOST_DOTS = 200  # on a line: TOML's reader takes a time that grows with the square of a name's dots


def read_toml(text: str) -> dict[str, Any]:
    """Return what TOML text says; its reader is imported when there is some to read."""
    import tomllib

    return tomllib.loads(text)


READERS: dict[str, Callable[[str], Any]] = {".toml": read_toml, ".json": json.loads}


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a file; dashes in their names count as underscores.

    Arguments:
        path: A file that ends in .toml or .json.

    Raises:
        UsageError: It is missing, of another kind, too large, too deep, or no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "run.toml"
        ...     _ = file.write_text('batch-size = 64')
        ...     read_config(file)
        {'batch_size': 64}
    """
    text = bounded_text(path)
    try:
        values = READERS[path.suffix.lower()](text)
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply; settings are plain values and lists of them") from None
    except ValueError as error:
        raise UsageError(f"{path}: this is not {path.suffix[1:].upper()}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: it must hold names and values, and holds a {type(values).__name__}")
    if too_deep(values):
        raise UsageError(f"{path}: nested too deeply; settings are plain values and lists of them")
    if name := next((name for name, value in values.items() if too_long(value)), None):
        raise UsageError(f"{path}: {name} is a number of more than {MOST_BITS} bits")
    return with_underscores(values, path)


def bounded_text(path: Path) -> str:
    """Return a file's text, its kind and length checked first."""
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        raise UsageError(f"{path}: YAML is not read; write TOML: `key: value` becomes `key = value`")
    if suffix not in READERS:
        raise UsageError(f"{path}: a configuration file ends in .toml or .json")
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    if (length := path.stat().st_size) > MOST_BYTES:
        raise UsageError(f"{path}: {length:,} bytes; a configuration file has {MOST_BYTES:,} at most")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: this is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise UsageError(f"{path}: a line has more than {MOST_DOTS} dots; settings are plain names and values")
    return text


def too_deep(values: Any, most: int = MOST_DEPTH) -> bool:
    """Whether values are nested more than so many levels deep."""
    if not isinstance(values, dict | list):
        return False
    inner = values.values() if isinstance(values, dict) else values
    return most == 0 or any(too_deep(value, most - 1) for value in inner)


def too_long(value: Any) -> bool:
    """Whether a whole number, here or in a list, is too long to be one that is meant."""
    if isinstance(value, list):
        return any(too_long(part) for part in value)
    return isinstance(value, int) and value.bit_length() > MOST_BITS


def with_underscores(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values under the names that Python uses."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in renamed:
            raise UsageError(f"{path}: {name} is there twice, with a dash and with an underscore; keep one")
        renamed[name] = value
    return renamed


def one_line(error: Exception) -> str:
    """Return an error's message as one line."""
    return " ".join(str(error).split())
