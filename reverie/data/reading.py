r"""What does a picture of shapes show? Measured from its pixels alone.

The picture is cut into blobs of what is not background. A blob's pixels p are explained as a mixture of a
colour and the background,

    a = <p - background, colour - background> / |colour - background|^2,    clipped to [0, 1],       (1)

the colour being the one of COLOURS that leaves the least square error. Then each kind of shape is laid over a with the
area and the centre of mass that a has. The kind that leaves the least unexplained,

    misfit = sum |a - a_kind| / sum a,                                                               (2)

is the blob's. The reading knows nothing of how a scene was made but the shapes, sizes and colours there are,
so it measures the pictures that a model makes as well as those it was trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.data.shapes import BACKGROUND, COLOURS, KINDS, SIZES, Scene, Shape, coverage

_FOREGROUND = 90  # the largest difference of a channel from the background's that is still background
_SPECK = 0.004  # of the square of the shorter side: a blob of less is no shape
_BETWEEN = (SIZES["small"][1] + SIZES["large"][0]) / 2


@dataclass(frozen=True)
class Reading:
    """What was read from a picture.

    Arguments:
        scene: The shapes found, from left to right.
        misfits: For each shape, the part of it that its kind leaves unexplained: 0 is a perfect drawing.
        specks: How many blobs were too small to be shapes.
    """

    scene: Scene
    misfits: tuple[float, ...]
    specks: int


def read_scene(image: UInt8[Tensor, "3 h w"] | UInt8[np.ndarray, "3 h w"]) -> Reading:
    """Measure which shapes a picture shows: kinds, colours, sizes and places.

    Arguments:
        image: The picture (3, H, W), uint8.

    Raises:
        UsageError: The picture is not (3, H, W) in uint8.

    Example:
        >>> from reverie.data import open_dataset
        >>> shapes = open_dataset("shapes:32,count=3")
        >>> read_scene(shapes.images([0])[0]).scene.words == shapes.truth(0).words
        True
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise UsageError(f"read_scene: {pixels.dtype} of shape {pixels.shape}; it takes uint8 of (3, H, W)")
    difference = pixels.transpose(1, 2, 0).astype(np.float64) - BACKGROUND
    found, specks = [], 0
    for blob in _blobs(np.abs(difference).max(-1) > _FOREGROUND):
        if blob.sum() < max(2, _SPECK * min(blob.shape) ** 2):
            specks += 1
        else:
            found.append(_read_blob(difference, blob))
    found.sort(key=lambda item: item[0].x)
    return Reading(Scene(tuple(shape for shape, _ in found)), tuple(misfit for _, misfit in found), specks)


def _blobs(foreground: Bool[np.ndarray, "h w"]) -> Iterator[Bool[np.ndarray, "h w"]]:
    """Yield the parts of the foreground whose pixels are neighbours, side by side."""
    left = foreground.copy()
    while left.any():
        blob = np.zeros_like(left)
        blob[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = _grow(blob) & left
            if (grown == blob).all():
                break
            blob = grown
        yield blob
        left &= ~blob


def _grow(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return a mask with the four neighbours of its pixels."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _read_blob(difference: Float[np.ndarray, "h w 3"], blob: Bool[np.ndarray, "h w"]) -> tuple[Shape, float]:
    """Return the shape that explains a blob, and its misfit."""
    height, width = blob.shape
    top, left = (max(int(np.flatnonzero(blob.any(axis))[0]) - 3, 0) for axis in (1, 0))
    bottom, right = (int(np.flatnonzero(blob.any(axis))[-1]) + 4 for axis in (1, 0))
    blob, difference = blob[top:bottom, left:right], difference[top:bottom, left:right]
    colour = min(COLOURS, key=lambda name: _shade(difference[blob], name)[1])
    shade = np.where(_grow(_grow(blob)), _shade(difference, colour)[0], 0)  # with its antialiased edge
    misfit, kind, (x, y), radius = min(_fit(shade, kind) for kind in KINDS)
    radius /= min(height, width)
    size = "small" if radius < _BETWEEN else "large"
    return Shape(kind, colour, size, (x + left) / width, (y + top) / height, radius), misfit


def _fit(shade: Float[np.ndarray, "h w"], kind: str) -> tuple[float, str, tuple[float, float], float]:
    """Return (misfit, kind, centre, radius) of a kind that has a shade's area and centre of mass, in pixels."""
    height, width = shade.shape
    area = shade.sum()
    unit_area, unit_y = _unit_measures(kind)
    radius = float(np.sqrt(area / unit_area))
    x = float(shade.sum(0) @ (np.arange(width) + 0.5) / area)
    y = float(shade.sum(1) @ (np.arange(height) + 0.5) / area) - unit_y * radius
    misfit = float(np.abs(shade - coverage(kind, (x, y), radius, height, width)).sum() / area)
    return misfit, kind, (x, y), radius


def _shade(difference: Float[np.ndarray, "*n 3"], colour: str) -> tuple[Float[np.ndarray, "*n"], float]:
    """Return how much of a colour is in each pixel, by (1), and the square error that it leaves."""
    full = np.subtract(COLOURS[colour], BACKGROUND)
    shade = (difference @ full / (full @ full)).clip(0, 1)
    return shade, float(np.square(difference - shade[..., None] * full).sum())


@lru_cache
def _unit_measures(kind: str) -> tuple[float, float]:
    """Return the area of a kind of radius 1, and how far its centre of mass lies below its centre."""
    side, radius = 800, 380
    covered = coverage(kind, (side / 2, side / 2), radius, side, side)
    area = covered.sum()
    below = covered.sum(1) @ (np.arange(side) + 0.5) / area - side / 2
    return float(area / radius**2), float(below / radius)
