"""A data set of the Hugging Face hub: hub:owner/name, or hub:owner/name:split (train by default).

The library `datasets` fetches it (extra [hub]), honouring HF_HUB_OFFLINE, HF_HOME and HF_TOKEN, and runs no
code of the data set's. The images are taken as files and decoded here, by the same decoders and limits as
any others; the classes are the first ClassLabel's, the captions the text column called text or caption.

References:
    Datasets: Load image data
    https://huggingface.co/docs/datasets/image_load
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reverie.base.errors import DataError, UsageError
from reverie.data.decode import BadImage
from reverie.data.files import ImageFiles
from reverie.data.options import Options
from reverie.data.stores import Entry

TEXT_COLUMNS = ("text", "caption")
_SPEC = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.-]+))?")


class Rows:
    """Reads the image files in a column of a table."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self.column = column

    def read(self, place: int) -> bytes:
        """Return the image file of a row."""
        value = self.table[place][self.column]
        if not value:
            raise BadImage("the row has no image")
        try:
            return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from None


def open_hub(argument: str, options: Options) -> ImageFiles:
    """Return the images of a data set of the hub.

    Arguments:
        argument: owner/name or owner/name:split.
        options: How to read it.

    Raises:
        UsageError: The name is none, or the library is not installed.
        DataError: It can't be fetched, or has no images.
    """
    match = _SPEC.fullmatch(argument)
    if match is None:
        raise UsageError(f"hub:{argument}: expected hub:owner/name or hub:owner/name:split")
    name, split = match["name"], match["split"] or "train"
    table = _load(name, split)
    column = _image_column(table, name)
    label, text = _label_column(table), _text_column(table)
    rows = Rows(_as_files(table, column), column)
    entries = [Entry(f"{row:09d}", f"hub:{name}:{split}, row {row}", rows, row) for row in range(len(table))]
    classes = tuple(table.features[label].names) if label else ()
    return ImageFiles(
        f"hub:{name}:{split}", entries, options, classes, _labels(table, label, name), _captions(table, text)
    )


def _load(name: str, split: str) -> Any:
    """Return a split of a data set as a table, fetched or from the cache."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"hub:{name} needs the library datasets, which is not installed: pip install 'reverie[hub]'"
        ) from None
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises its own, the network's and the file system's
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"hub:{name}:{split} can't be loaded: {type(error).__name__}: {reason}") from None


def _as_files(table: Any, column: str) -> Any:
    """Return the table with its image column as (bytes, path): we decode, the library doesn't."""
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _image_column(table: Any, name: str) -> str:
    import datasets

    columns = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise DataError(f"hub:{name}: no column of images; the columns are {', '.join(table.features)}")
    return next((column for column in ("image", "img") if column in columns), columns[0])


def _label_column(table: Any) -> str | None:
    import datasets

    columns = (column for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel))
    return next(columns, None)


def _text_column(table: Any) -> str | None:
    return next((column for column in TEXT_COLUMNS if column in table.features), None)


def _labels(table: Any, column: str | None, name: str) -> dict[str, int] | None:
    """Return the class of each row, by its entry's name."""
    if column is None:
        return None
    values: Sequence[int | None] = table[column][:]
    without = [row for row, value in enumerate(values) if value is None or value < 0]
    if without:
        raise DataError(f"hub:{name}: row {without[0]} has no {column}, nor have {len(without) - 1} others")
    return {f"{row:09d}": int(value) for row, value in enumerate(values) if value is not None}


def _captions(table: Any, column: str | None) -> dict[str, str]:
    values = table[column][:] if column else []
    return {f"{row:09d}": value for row, value in enumerate(values) if isinstance(value, str)}
