"""metadata.jsonl and metadata.csv: captions and labels of images, as Hugging Face's ImageFolder has them.

Example:
    {"file_name": "cats/1.png", "text": "a grey cat", "label": "cat"}
"""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from reverie.base.errors import DataError
from reverie.data.decode import BadImage
from reverie.data.stores import Entry, inside

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
TEXT_COLUMNS = ("text", "caption")


class Row(NamedTuple):
    """What metadata says of one image."""

    text: str | None
    label: str | int | None
    source: str


def read_metadata(entry: Entry) -> dict[str, Row]:
    """Return the rows of a metadata file, by the image's name within the source.

    Raises:
        DataError: A row can't be read, has no file_name, or one that leads out of the source; the line is named.
    """
    try:
        text = entry.read().decode("utf-8-sig")
    except (BadImage, UnicodeDecodeError) as error:
        raise DataError(f"{entry.path}: can't be read as UTF-8: {error}") from None
    folder = PurePosixPath(entry.name).parent
    rows = {}
    for line, fields in _csv_rows(text, entry) if entry.name.endswith(".csv") else _json_rows(text, entry):
        where = f"{entry.path}, line {line}"
        name = str(folder / inside(_file_name(fields, where), where))
        rows[name] = Row(_text(fields, where), _label(fields, where), entry.name)
    return rows


def class_names(values: Collection[str | int]) -> list[str | int]:
    """Return the classes in order: numbers by size, names by letter.

    Raises:
        DataError: Some labels are numbers and some are names.

    Example:
        >>> class_names({10, 9}), class_names({"dog", "cat"})
        ([9, 10], ['cat', 'dog'])
    """
    if len({type(value) for value in values}) > 1:
        raise DataError("some labels are numbers and some are names; use one kind")
    return sorted(values)


def _json_rows(text: str, entry: Entry) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            fields = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{entry.path}, line {line}: is no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise DataError(f'{entry.path}, line {line}: is no object; expected {{"file_name": ..., "text": ...}}')
        yield line, fields


def _csv_rows(text: str, entry: Entry) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for fields in reader:
            label = fields.get("label")
            number = label is not None and label.isascii() and label.isdigit()
            yield reader.line_num, {**fields, "label": int(label)} if number and label else fields
    except csv.Error as error:
        raise DataError(f"{entry.path}, line {reader.line_num}: is no CSV: {error}") from None


def _file_name(fields: Mapping[str, Any], where: str) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: has no file_name; the columns are {', '.join(map(str, fields))}")
    return name


def _text(fields: Mapping[str, Any], where: str) -> str | None:
    for column in TEXT_COLUMNS:
        text = fields.get(column)
        if text is not None:
            if not isinstance(text, str):
                raise DataError(f"{where}: {column} is a {type(text).__name__}, not a text")
            return text
    return None


def _label(fields: Mapping[str, Any], where: str) -> str | int | None:
    label = fields.get("label")
    if label is None or label == "":
        return None
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise DataError(f"{where}: label is a {type(label).__name__}, not a name or a whole number")
    return label
