"""Pictures on a disk: numbered files that are never overwritten, contact sheets, animations.

Each PNG carries how it was made (provenance.py).
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.storage import guarded, sync_folder, write_synced
from reverie.models.model import Samples, to_pil, to_uint8
from reverie.models.provenance import COMMON, OWN, again, parameters_text, read_provenance
from reverie.models.sampling import Intermediate

__all__ = [
    "again", "animation", "check_folder", "grid_picture", "picture_bytes", "read_provenance", "sample_bytes",
    "write_new", "write_pictures",
]  # fmt: skip

NUMBERED = re.compile(r"(\d{5,18})-.*", re.ASCII)
READABLE = 56  # pixels that a picture on a contact sheet has at least, so that an 8x8 digit can be read
LINE = 14  # pixels of a line of text
GAP = 4


# Files ----------------------------------------------------------------------------------------------


def write_pictures(samples: Samples, folder: Path | str) -> list[Path]:
    """Write each sample as a PNG of its own, NNNNN-seedS.png, numbered on from the highest number there.

    Arguments:
        samples: What to write.
        folder: Where; made if it is not there.

    Returns:
        The files.

    Raises:
        NonFiniteError: A sample holds NaN or infinity; nothing was written.
        UsageError: The samples are no pictures, or the folder is a file; nothing was written.
        StorageError: The disk is full, read-only or gone.
    """
    folder = Path(folder)
    check_folder(folder)
    contents = [sample_bytes(samples, i, picture) for i, picture in enumerate(samples.pil())]
    paths = []
    with guarded(folder, sum(map(len, contents))):
        folder.mkdir(parents=True, exist_ok=True)
        number = next_number(folder)
        for seed, content in zip(samples.seeds.tolist(), contents, strict=True):
            while not write_unless_there(path := folder / f"{number:05d}-seed{seed}.png", content):
                number += 1
            paths.append(path)
            number += 1
        sync_folder(folder)
    return paths


def check_folder(folder: Path | str) -> None:
    """Refuse a folder for pictures that is a file."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{folder} is a file, not a folder; choose another")


def next_number(folder: Path) -> int:
    """Return one more than the highest number that a file's name in a folder begins with."""
    taken = (NUMBERED.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in taken if match), default=-1) + 1


def write_unless_there(path: Path, content: bytes) -> bool:
    """Write a file whole, and return whether it was written: not if there is one, whoever made it, and when."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_synced(beside, content)
        try:
            os.link(beside, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return copy_unless_there(path, content)
    finally:
        with suppress(OSError):
            beside.unlink()
    return True


def copy_unless_there(path: Path, content: bytes) -> bool:
    """Write a file in place, and return whether it was written: not if there is one."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except BaseException:
        path.unlink()
        raise
    return True


def write_new(path: Path | str, content: bytes) -> Path:
    """Write a file that is not there yet, whole or not at all.

    Raises:
        UsageError: It is there.
        StorageError: The disk is full, read-only or gone.
    """
    path = Path(path)
    with guarded(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not write_unless_there(path, content):
            raise UsageError(f"{path} is there already; choose another name")
    return path


def sample_bytes(samples: Samples, i: int, picture: Image.Image | None = None) -> bytes:
    """Return sample i as the bytes of a PNG that says how it was made."""
    picture = to_pil(samples.uint8[i]) if picture is None else picture
    record = samples.record_of(i)
    texts = {COMMON: parameters_text(record, picture.size), OWN: json.dumps(record, ensure_ascii=False)}
    return picture_bytes(picture, texts)


def picture_bytes(picture: Image.Image | UInt8[Tensor, "c h w"], texts: dict[str, str] | None = None) -> bytes:
    """Return a picture as the bytes of a PNG.

    Arguments:
        picture: Pillow's, or bytes (C, H, W).
        texts: Its text chunks.
    """
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_text(name, text)
    buffer = BytesIO()
    image = to_pil(picture) if isinstance(picture, Tensor) else picture
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


# Contact sheets and animations ----------------------------------------------------------------------


def grid_picture(
    images: UInt8[Tensor, "n c h w"],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Return pictures side by side, each with its label below.

    Arguments:
        images: The pictures (n, C, H, W).
        columns: How many side by side; None for about as many as rows.
        labels: What to write below each.
        scale: How many times to enlarge, each pixel a square; None for what can be read.

    Example:
        >>> import torch
        >>> grid_picture(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), columns=3, scale=1).size
        (40, 28)
    """
    count, _, height, width = images.shape
    if labels is not None and len(labels) != count:
        raise UsageError(f"there are {len(labels)} labels for {count} pictures; give one for each")
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1 or count < 1:
        raise UsageError(
            f"a sheet of {count} pictures in {columns} columns has no place for any; give at least 1 of each"
        )
    scale = scale or max(1, math.ceil(READABLE / min(height, width)))
    cell_width, cell_height = width * scale + GAP, height * scale + GAP + (LINE if labels is not None else 0)
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default()
    for i, image in enumerate(images):
        left, top = GAP + i % columns * cell_width, GAP + i // columns * cell_height
        picture = to_pil(image).convert("RGBA").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top), picture)
        if labels is not None:
            pen.text((left, top + height * scale + 1), fitting(labels[i], width * scale, pen.textlength), "black")
    return sheet


def fitting(label: str, width: int, length: Callable[[str], float]) -> str:
    """Return as much of a label as has room."""
    label = " ".join(label.split())
    while len(label) > 1 and length(label) > width:
        label = label[:-1]
    return label


def animation(
    intermediates: Sequence[Intermediate],
    path: Path | str,
    columns: int | None = None,
    scale: int | None = None,
    milliseconds: int = 80,
) -> Path:
    """Write the denoising as an animated GIF or WebP, which rests on its last frame.

    Arguments:
        intermediates: Where the samples were, in the order of their steps.
        path: A file that is not there yet, .gif or .webp.
        columns: As for `grid_picture`.
        scale: As for `grid_picture`.
        milliseconds: How long each frame is shown.

    Raises:
        UsageError: There are no intermediates, the file is there, or has another ending.
        StorageError: The disk is full, read-only or gone.
    """
    path = Path(path)
    kinds = {".gif": "GIF", ".webp": "WEBP"}
    if path.suffix.lower() not in kinds:
        raise UsageError(f"{path} ends with {path.suffix or 'nothing'}; an animation is a .gif or a .webp")
    if not intermediates:
        raise UsageError("there is nothing to animate; sample with intermediates=20, say")
    frames = [grid_picture(frame(passed), columns, scale=scale) for passed in intermediates]
    times = [milliseconds] * (len(frames) - 1) + [20 * milliseconds]
    buffer = BytesIO()
    lossless = {"lossless": True} if path.suffix.lower() == ".webp" else {}
    frames[0].save(
        buffer, kinds[path.suffix.lower()], save_all=True, append_images=frames[1:], duration=times, loop=0, **lossless
    )
    return write_new(path, buffer.getvalue())


def frame(passed: Intermediate) -> UInt8[Tensor, "n c h w"]:
    """Return the noisy samples as pictures, their spread brought back to 1 where the noise is larger."""
    return to_uint8(passed.x / max(1.0, float(passed.x.std(correction=0))))
