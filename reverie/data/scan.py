"""The opening scan: every file is looked at once, before anything is made of any.

Each file is read and hashed, and its header held against the limits. The form (channels, size) is chosen
from the good ones; where all of them fit the cache in that form they are decoded into it, which is the
full test; where not, the end of each file is looked for. Bad files are named and counted; more than
allowed end the reading. The good ones alone decide everything else, so that a data set with its bad
files left out is the same data set.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from reverie.base.errors import DataError
from reverie.data.dataset import Header, Skipped
from reverie.data.decode import BadImage, Form, check_end, decode, read_header
from reverie.data.options import Options
from reverie.data.size import choose_form
from reverie.data.stores import Entry

LISTED = 20
PATIENCE = 2.0  # seconds before the bar shows
_CHUNK = 256


@dataclass
class Scan:
    """What the opening scan found.

    Arguments:
        entries: The files that can be read.
        headers: Their headers.
        digests: The sha256 of each file.
        skipped: The files that can't be read.
        form: What all images are brought to.
        pixels: The images (N, C, H, W), where they fit the cache.
    """

    entries: list[Entry]
    headers: list[Header]
    digests: list[bytes]
    skipped: list[Skipped] = field(default_factory=list)
    form: Form = field(default_factory=lambda: Form(3, 1, 1))
    pixels: np.ndarray | None = None


def scan(entries: Sequence[Entry], options: Options, name: str) -> Scan:
    """Look at every file, and decode them all where they fit the cache.

    Raises:
        DataError: More files than allowed can't be read, or none can.
    """
    found = _read_all(entries, name)
    refuse_beyond(found.skipped, len(entries), options, name)
    while True:
        found.form = choose_form(found.headers, options)
        fits = len(found.entries) * np.prod(found.form) <= options.cache
        bad = _decode_all(found, name) if fits else _check_ends(found, name)
        if not bad:
            return found
        _leave_out(found, bad)
        refuse_beyond(found.skipped, len(entries), options, name)


def refuse_beyond(bad: Sequence[Skipped], count: int, options: Options, name: str) -> None:
    """End the reading if more of so many files are bad than may be.

    Raises:
        DataError: They are; the message names the first.
    """
    if len(bad) <= options.allowed_bad(count):
        return
    listed = "; ".join(map(str, bad[:LISTED])) + ("; ..." if len(bad) > LISTED else "")
    if len(bad) == count:
        raise DataError(f"{name}: none of the {count} images can be read: {listed}")
    raise DataError(
        f"{name}: {len(bad)} of {count} images can't be read, at most {options.allowed_bad(count)} may be left out "
        f"(mend or delete them, or pass --on-bad skip): {listed}"
    )


# The passes over the files --------------------------------------------------------------------


def _read_all(entries: Sequence[Entry], name: str) -> Scan:
    """Read, hash and take the header of every file."""
    found = Scan([], [], [])
    with warnings.catch_warnings():  # our limit is the lower one, and refuses
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for entry, result in zip(entries, _parallel(_look, entries, f"reading {name}"), strict=True):
            if isinstance(result, BadImage):
                found.skipped.append(Skipped(entry.path, str(result)))
            else:
                found.entries.append(entry)
                found.headers.append(result[0])
                found.digests.append(result[1])
    return found


def _look(entry: Entry) -> tuple[Header, bytes]:
    data = entry.read()
    return read_header(data), sha256(data).digest()


def _decode_all(found: Scan, name: str) -> dict[int, BadImage]:
    """Decode every image into the cache; return those that could not be."""
    pixels = np.empty((len(found.entries), *found.form), np.uint8)

    def fill(index: int) -> None:
        pixels[index] = decode(found.entries[index].read(), found.form)

    found.pixels = pixels
    return _failures(fill, len(pixels), f"decoding {name}")


def _check_ends(found: Scan, name: str) -> dict[int, BadImage]:
    """Look for the end of every file; return those that have none."""

    def check(index: int) -> None:
        check_end(found.entries[index].read(), found.headers[index])

    return _failures(check, len(found.entries), f"checking {name}")


def _failures(function: Callable[[int], None], count: int, what: str) -> dict[int, BadImage]:
    results = enumerate(_parallel(function, range(count), what))
    return {index: result for index, result in results if isinstance(result, BadImage)}


def _leave_out(found: Scan, bad: dict[int, BadImage]) -> None:
    """Move bad files from those found to those skipped."""
    found.skipped += [Skipped(found.entries[index].path, str(reason)) for index, reason in bad.items()]
    found.skipped.sort()
    kept = [index for index in range(len(found.entries)) if index not in bad]
    found.entries = [found.entries[index] for index in kept]
    found.headers = [found.headers[index] for index in kept]
    found.digests = [found.digests[index] for index in kept]
    found.pixels = None


def _parallel(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> Iterator[Any]:
    """Yield function(item) for each item in order, or the BadImage it raised; a few threads, few items ahead."""

    def attempt(item: Any) -> Any:
        try:
            return function(item)
        except BadImage as reason:
            return reason

    rest = iter(items)
    bar = tqdm(total=len(items), desc=what, unit="file", file=sys.stderr, delay=PATIENCE, leave=False)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(rest, _CHUNK)):
            for result in pool.map(attempt, chunk):
                bar.update()
                yield result
