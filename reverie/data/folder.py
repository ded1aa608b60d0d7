"""A folder of images, or a .zip or .tar of one, read where it lies.

Layouts, told apart by what is there:

- flat: images in the folder, or in folders of it beside loose ones: no labels;
- class folders: every image in a folder of its class: cats/1.png, dogs/2.png. Folders that hold all the
  images are passed through: photos/cats/1.png, photos/dogs/2.png has the same classes. train/ and test/ are
  no classes: one of them has to be named;
- metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder has it: file_name (relative to the metadata),
  text (or caption), label;
- captions beside the images: 1.png and 1.txt;
- shards: a folder without images of its own, but with .tar or .zip files: read as if they were unpacked there.

References:
    Datasets: Create an image dataset
    https://huggingface.co/docs/datasets/image_dataset
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from reverie.base.errors import DataError, UsageError
from reverie.data.decode import BadImage
from reverie.data.files import ImageFiles
from reverie.data.metadata import METADATA_NAMES, Row, class_names, read_metadata
from reverie.data.options import Options
from reverie.data.stores import Entry, open_store

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREAD_EXTENSIONS = (".heic", ".heif", ".avif", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".jxl", ".jp2", ".tga")
ARCHIVES = (".tar", ".zip")
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


class Missing:
    """Stands for files that metadata names and that are not there."""

    def read(self, place: str) -> bytes:
        """Raise BadImage: there is nothing to read."""
        raise BadImage(f"named in {place}, but not there")


def open_folder(argument: str, options: Options) -> ImageFiles:
    """Return the images of a folder or archive, with their classes and captions.

    Arguments:
        argument: The path.
        options: How to read it.

    Raises:
        UsageError: The path does not exist.
        DataError: There is no image, more than allowed can't be read, or the layout contradicts itself.
    """
    path = Path(argument).expanduser()
    if not argument or not path.exists():
        raise UsageError(f"{argument or 'folder:'}: no such folder or archive")
    entries, notes = _list(path)
    images = [entry for entry in entries if _is_image(entry.name)]
    rows = _rows(entries)
    images += _missing(rows, images, path)
    images.sort(key=lambda entry: entry.name)
    if not images:
        raise DataError(f"{path}: no image in it{_others(entries)}; looked for {' '.join(EXTENSIONS)}")

    classes, labels, remarks = _labels(images, rows, path)
    captions = {name: row.text for name, row in rows.items() if row.text is not None}
    captions = captions or _captions_beside(entries, images)
    without = sum(entry.name not in rows for entry in images) if rows else 0
    if without:
        remarks.append(f"{without} of {len(images)} images have no row in the metadata")
    return ImageFiles(str(path), images, options, classes, labels, captions, [*notes, *remarks])


# What is there --------------------------------------------------------------------------------


def _list(path: Path) -> tuple[list[Entry], list[str]]:
    """List a folder, or an archive, or the archives in a folder that has no images of its own."""
    entries = open_store(path)
    shards = [entry for entry in entries if entry.name.lower().endswith(ARCHIVES)]
    if not path.is_dir() or not shards or any(_is_image(entry.name) for entry in entries):
        return entries, []
    merged = {entry.name: entry for entry in entries if entry not in shards}
    for shard in shards:
        for entry in open_store(Path(shard.path)):
            name = str(PurePosixPath(shard.name).parent / entry.name)
            if name in merged:
                raise DataError(f"{entry.path} and {merged[name].path} have the same name; one of them would be lost")
            merged[name] = replace(entry, name=name)
    return list(merged.values()), [f"images are read from {', '.join(shard.name for shard in shards)}"]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS + UNREAD_EXTENSIONS)


def _others(entries: Sequence[Entry]) -> str:
    """Say what else was found where no image was."""
    if not entries:
        return ", it is empty"
    counts = Counter(os.path.splitext(entry.name)[1].lower() or "no extension" for entry in entries)
    return f" ({', '.join(f'{count} files of {extension}' for extension, count in counts.most_common(3))})"


def _rows(entries: Sequence[Entry]) -> dict[str, Row]:
    """Return the metadata's rows by the name of the image."""
    rows: dict[str, Row] = {}
    for entry in entries:
        if PurePosixPath(entry.name).name in METADATA_NAMES:
            rows.update(read_metadata(entry))
    return rows


def _missing(rows: dict[str, Row], images: Sequence[Entry], path: Path) -> list[Entry]:
    """Return entries for files that the metadata names and that are not there: they count as bad ones."""
    there = {entry.name for entry in images}
    absent = Missing()
    return [Entry(name, f"{path}/{name}", absent, row.source) for name, row in rows.items() if name not in there]


# Labels and captions --------------------------------------------------------------------------


def _labels(
    images: Sequence[Entry], rows: dict[str, Row], path: Path
) -> tuple[tuple[str, ...], dict[str, int] | None, list[str]]:
    """Return (class names, class by file name, remarks): the metadata's labels, else the folders'."""
    given: dict[str, str | int] = {name: row.label for name, row in rows.items() if row.label is not None}
    if given:
        without = [entry for entry in images if entry.name not in given]
        if without:
            raise DataError(f"{without[0].path}: has no label in the metadata, as {len(given)} others do; give it one")
        remarks: list[str] = []
    else:
        given, remarks = _folder_classes(images, path)
    names = class_names(set(given.values()))
    number = {value: index for index, value in enumerate(names)}
    classes = tuple(str(value) for value in names)
    return classes, {name: number[value] for name, value in given.items()} if given else None, remarks


def _folder_classes(images: Sequence[Entry], path: Path) -> tuple[dict[str, str | int], list[str]]:
    """Return the class of each image by the first folder that tells them apart."""
    parents = [PurePosixPath(entry.name).parts[:-1] for entry in images]
    shared = len(os.path.commonprefix(parents))  # noqa: RUF071 - tuples: it compares part by part
    loose = sum(len(parent) == shared for parent in parents)
    if loose:
        inner = len(images) - loose
        remark = f"folders are not taken as classes: {loose} images lie beside {inner} in folders"
        return {}, [remark] if inner else []
    names = {parent[shared] for parent in parents}
    if all(name.lower() in SPLITS for name in names):
        listed = ", ".join(sorted(names))
        raise DataError(f"{path}: holds the parts {listed}, which are not classes; name one, as in {path}/{min(names)}")
    return {entry.name: parent[shared] for entry, parent in zip(images, parents, strict=True)}, []


def _captions_beside(entries: Sequence[Entry], images: Sequence[Entry]) -> dict[str, str]:
    """Return the text of each image's .txt file, where it has one."""
    texts = {entry.name: entry for entry in entries if entry.name.lower().endswith(".txt")}
    captions = {}
    for image in images:
        text = texts.get(os.path.splitext(image.name)[0] + ".txt")
        if text is not None:
            captions[image.name] = _read_text(text)
    return captions


def _read_text(entry: Entry) -> str:
    try:
        return entry.read().decode("utf-8-sig").strip()
    except (BadImage, UnicodeDecodeError) as error:
        raise DataError(f"{entry.path}: is no caption in UTF-8: {error}") from None
