"""Files from strangers: what they are by their content, and no step out of their folder."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from reverie.base.errors import ModelFileError

MAX_JSON = 16 << 20

# What a file begins with, and what it then is.
SIGNS = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture, not weights"),
    (b"\xff\xd8\xff", "a JPEG picture, not weights"),
    (b"version https://git-lfs", "a pointer of Git LFS, not weights: fetch the file itself (git lfs pull)"),
    (b"PK\x03\x04", "an archive of PyTorch's pickles, which contains code, not only weights"),
    (b"\x1f\x8b", "a gzip archive, not weights"),
    (b"ustar", "a tar archive, not weights"),
    (b"GGUF", "a GGUF file, which is not supported"),
)
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def what_is(path: Path) -> str | None:
    """Return what a file is that is no safetensors file, by its first bytes; None where they say nothing.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file"
    for sign, kind in SIGNS:
        if start.startswith(sign):
            return kind
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights: the download was refused, or the link was to a page"
    if start.startswith(PICKLES):
        return "a pickle, which contains code, not only weights"
    if text.startswith((b"{", b"[")):
        return "a JSON file, not weights"
    return None


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        ModelFileError: It is missing, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > limit:
            raise ModelFileError(f"{path} is larger than {limit} bytes; a model's settings are not")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} holds a {type(values).__name__}, not settings by name")
    return values


def inside(folder: Path, name: str) -> Path:
    """Return the file of that name in a folder, having refused one that leaves it.

    A link may point to where the folder's contents are kept: within the folder, or, for a snapshot in the
    cache of Hugging Face's hub, to the blobs beside the snapshots.

    Raises:
        ModelFileError: The name is no plain name of a file, or the file lies elsewhere.
    """
    plain = isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable()
    if not plain or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name} or name in (".", ".."):
        raise ModelFileError(f"{folder} names the file {str(name)[:100]!r}, which leaves its folder; nothing was read")
    path = folder / name
    real, roots = path.resolve(), [folder.resolve()]
    for parent in roots[0].parents[:3]:
        if (parent / "blobs").is_dir() and (parent / "snapshots").is_dir():
            roots.append((parent / "blobs").resolve())
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelFileError(f"{path} is a link to {real}, outside its folder; copy the file in place")
    return path
