r"""From the bytes of an image file to uint8 pixels (C, H, W), by rules that are stated.

What is opened: six decoders (PNG, JPEG, WEBP, BMP, GIF, TIFF), told apart by content, never by name.
Limits are read from the header, before any pixel is decoded: a file may ask for MAX_PIXELS, and beyond
LARGE_PIXELS for no more than MAX_PACKING pixels for each of its bytes, which no photograph comes near.

How pixels are converted, in this order:

1. of several pictures in a file, the first;
2. turned as its EXIF orientation says;
3. 16 bits to 8 by round(v / 257) (colour of 16 bits, which Pillow halves itself: the top byte); 32-bit
   integers as 16-bit ones where they fit; floats in [0, 1] by round(255 v);
4. transparency laid over white, unless 4 channels are asked for;
5. palettes, CMYK and YCbCr to RGB as Pillow converts them, colour profiles unread; grey = 0.299 R + 0.587 G
   + 0.114 B;
6. the largest centred rectangle of the target's shape is cut out, and resized with Lanczos' filter, widened
   when it shrinks (antialiasing); a picture that has the target's size is left as it is.
"""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import BmpImagePlugin as _bmp  # noqa: F401, N813 - the six decoders, so that Pillow imports no other
from PIL import GifImagePlugin as _gif  # noqa: F401, N813
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import JpegImagePlugin as _jpeg  # noqa: F401, N813
from PIL import PngImagePlugin as _png  # noqa: F401, N813
from PIL import TiffImagePlugin as _tiff  # noqa: F401, N813
from PIL import WebPImagePlugin as _webp  # noqa: F401, N813

from reverie.data.dataset import Header

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
LARGE_PIXELS = 16_000_000
MAX_PACKING = 1000
MAX_BYTES = 256 << 20

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 274
_SIGNATURES = {
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"GIF8": "a GIF",
    b"RIFF": "a WEBP",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
}


class BadImage(Exception):  # noqa: N818 - a finding about a file, turned into an error where it must be
    """A file that is no image that can be read; the message is the reason, without the file's name."""


class Form(NamedTuple):
    """What every image is brought to: channels (1, 3 or 4), height, width."""

    channels: int
    height: int
    width: int


def read_header(data: bytes) -> Header:
    """Return what the header of an image file says, decoding no pixels.

    Raises:
        BadImage: It is no image, or one beyond the limits.
    """
    image = _open(data)
    try:
        return _header(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever a hostile header makes it: any of it is a bad file
        raise BadImage(f"damaged header: {_reason(error)}") from None


def decode(data: bytes, form: Form) -> UInt8[np.ndarray, "c h w"]:
    """Return an image file's pixels (C, H, W), converted, turned, cropped and resized.

    Raises:
        BadImage: It is no image, is truncated or damaged, or lies beyond the limits.
    """
    image = _open(data)
    try:
        _shrink_on_load(image, form)
        image.load()
        turned = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadImage(_reason(error)) from None
    return to_pixels(turned, form)


def to_pixels(image: Image.Image, form: Form) -> UInt8[np.ndarray, "c h w"]:
    """Return a decoded picture's pixels (C, H, W): steps 3 to 6.

    Raises:
        BadImage: It has pixels of an unknown range, or colours that can't be converted.

    Example:
        >>> to_pixels(Image.new("RGBA", (4, 2), (255, 0, 0, 0)), Form(1, 2, 2)).tolist()
        [[[255, 255], [255, 255]]]
    """
    try:
        converted = _to_mode(to_eight_bits(image), {1: "L", 3: "RGB", 4: "RGBA"}[form.channels])
    except ValueError as error:
        raise BadImage(f"mode {image.mode}: {error}") from None
    pixels = np.asarray(_fit(converted, form.height, form.width))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check_end(data: bytes, header: Header) -> None:
    """Look for the mark at the end of a file: a cheap test for those that aren't decoded when opened.

    Raises:
        BadImage: The file is cut off.
    """
    tail = data[-4096:]
    whole = {
        "PNG": b"IEND" in tail,
        "JPEG": b"\xff\xd9" in tail,
        "MPO": b"\xff\xd9" in tail,
        "GIF": b";" in tail[-16:],
        "WEBP": len(data) >= int.from_bytes(data[4:8], "little") + 8,
        "BMP": len(data) >= int.from_bytes(data[2:6], "little"),
    }
    if not whole.get(header.format, True):
        raise BadImage("truncated: the end of the file is missing")


def describe(form: Form, headers: list[Header]) -> str:
    """Return one line that says what is done to the images to bring them to a form."""
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}[form.channels]
    over = " over white" if form.channels < 4 and any(header.alpha for header in headers) else ""
    if all((header.height, header.width) == form[1:] for header in headers):
        return f"{channels}{over}, {form.width}x{form.height} as they are"
    return f"{channels}{over}, centre crop and Lanczos to {form.width}x{form.height}"


# Opening --------------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    """Open a file with one of the six decoders and hold its header against the limits."""
    if not data:
        raise BadImage("empty file")
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data):,} bytes, more than the {MAX_BYTES:,} that an image may have")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(_what_it_is(data)) from None
    except Image.DecompressionBombError:
        raise BadImage(f"decompression bomb: more than the {MAX_PIXELS:,} pixels that an image may have") from None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadImage(_reason(error)) from None
    _check_pixels(*image.size, len(data))
    return image


def _check_pixels(width: int, height: int, size: int) -> None:
    """Refuse a decompression bomb."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise BadImage(f"decompression bomb: {width}x{height} in {size:,} bytes, limit {MAX_PIXELS:,} pixels")
    if pixels > LARGE_PIXELS and pixels > MAX_PACKING * size:
        raise BadImage(f"decompression bomb: {width}x{height} in {size:,} bytes, limit {MAX_PACKING} pixels a byte")


def _what_it_is(data: bytes) -> str:
    """Say why Pillow's six decoders would not have a file."""
    start = data[:256].lstrip().lower()
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return f"begins as {name} and is damaged"
    if data[4:8] == b"ftyp":
        return "HEIC, AVIF or a film, which are not read; convert it to PNG or JPEG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    if b"<svg" in start:
        return "SVG, which is not read; convert it to PNG"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in data[:256]):
        return "text, not an image"
    return f"not an image ({', '.join(FORMATS)} are read)"


def _reason(error: Exception) -> str:
    """Return an error of Pillow's in words."""
    text = " ".join(str(error).split()) or type(error).__name__
    cut_off = "truncat" in text.lower() or "unexpected end" in text.lower() or isinstance(error, EOFError)
    return f"truncated: {text}" if cut_off else f"damaged: {text}"


# The header -----------------------------------------------------------------------------------


def _header(image: Image.Image) -> Header:
    width, height = image.size
    orientation = _orientation(image)
    if orientation >= 5 and image.format != "TIFF":  # Pillow has already swapped a TIFF's sides
        width, height = height, width
    grey = image.mode in _GREY_MODES or image.mode.startswith("I;16") or _has_grey_palette(image)
    alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
    return Header(
        width, height, image.mode, str(image.format), grey, alpha, turned=orientation > 1, frames=_frames(image)
    )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1: upright) as far as it can be read without decoding."""
    if image.format == "TIFF":
        value: Any = getattr(image, "tag_v2", {}).get(_ORIENTATION)
    elif image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it all to look behind it
        value = None
    else:
        value = image.getexif().get(_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_grey_palette(image: Image.Image) -> bool:
    """Return whether an image with a palette has nothing but greys in it."""
    if image.mode != "P" or image.palette is None:
        return False
    rawmode, data = image.palette.getdata()
    if rawmode not in ("RGB", "BGR", "BGRX"):
        return False
    colours = np.frombuffer(bytes(data), np.uint8)
    colours = colours[: len(colours) // len(rawmode) * len(rawmode)].reshape(-1, len(rawmode))[:, :3]
    return bool((colours == colours[:, :1]).all())


def _frames(image: Image.Image) -> int:
    """Return how many pictures a file holds; those behind the first may be damaged, and count as none."""
    try:
        return int(getattr(image, "n_frames", 1))
    except (OSError, EOFError, SyntaxError, ValueError):
        return 1


# Pixels ---------------------------------------------------------------------------------------


def _shrink_on_load(image: Image.Image, form: Form) -> None:
    """Let a JPEG's decoder halve its size while more than twice the target's is left: quality is Lanczos' alone."""
    scale = 2 * max(form.height, form.width) / min(image.size)  # for either orientation
    if image.format in ("JPEG", "MPO") and scale < 1:
        image.draft(None, (int(image.width * scale) + 1, int(image.height * scale) + 1))


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Bring pixels of 16 and 32 bits to 8 (step 3).

    Raises:
        BadImage: They are no numbers, or out of range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadImage("NaN or infinity among its pixels")
    top = 1 if image.mode == "F" else 65535
    if values.min() < 0 or values.max() > top:
        found = f"{values.min():g} to {values.max():g}"
        raise BadImage(f"32-bit pixels from {found}, expected 0 to {top}; save it with 8 or 16 bits")
    eight = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        eight.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return eight


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert 8-bit pixels, laying transparency over white where the mode has none (steps 4 and 5)."""
    transparent = image.mode in _ALPHA_MODES or "transparency" in image.info
    if transparent and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    if image.mode == "CMYK" and mode != "RGB":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut out the largest centred rectangle of a shape, and resize it (step 6)."""
    scale = min(image.width / width, image.height / height)
    if scale == 1:
        x, y = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((x, y, x + width, y + height))
    cut_width, cut_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - cut_width) / 2, (image.height - cut_height) / 2
    box = (left, top, left + cut_width, top + cut_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
