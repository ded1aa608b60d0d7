r"""Masks to learn filling in with: rectangles, strokes, or everything; each a function of its key.

What the network sees beside its input is

    beside = [m, x_0 (1 - m)],    m = 1 where it is to draw,                                              (1)

in the order in which reverie.models.editing gives it.

References:
    GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (Nichol et al., 2022),
    on image inpainting
    https://arxiv.org/abs/2112.10741
"""

import math
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reverie.base.randomness import generator

EVERYTHING = 0.2  # share of masks that leave nothing: what is learned then is to draw from the words alone
STROKES = 0.4  # share that are strokes of a brush; the others are rectangles
MOST = 4  # rectangles or strokes of a mask


def random_mask(height: int, width: int, *key: SupportsIndex | str) -> Bool[Tensor, "h w"]:
    """Return a mask (H, W), true where it is to be drawn, fixed by the key; at least one pixel is.

    Example:
        >>> masks = [random_mask(8, 8, 0, "mask", i) for i in range(100)]
        >>> 10 < sum(bool(mask.all()) for mask in masks) < 35, min(int(mask.sum()) for mask in masks) > 0
        (True, True)
    """
    draw = generator(*key)
    kind, count = draw.random(), int(draw.integers(1, MOST + 1))
    if kind < EVERYTHING:
        return torch.ones(height, width, dtype=torch.bool)
    add = stroke if kind < EVERYTHING + STROKES else rectangle
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(count):
        mask |= add(height, width, draw)
    return torch.from_numpy(mask)


def rectangle(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Return a rectangle (H, W) of a random place, each side of one pixel up to three quarters."""
    mask = np.zeros((height, width), dtype=bool)
    rows, columns = (int(draw.integers(1, max(1, 3 * side // 4) + 1)) for side in (height, width))
    top, left = int(draw.integers(0, height - rows + 1)), int(draw.integers(0, width - columns + 1))
    mask[top : top + rows, left : left + columns] = True
    return mask


def stroke(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Return what a round brush leaves (H, W) that goes straight on, and turns a few times."""
    side = max(height, width)
    radius = max(0.6, side * float(draw.uniform(0.03, 0.12)))
    y, x = float(draw.uniform(0, height - 1)), float(draw.uniform(0, width - 1))
    rows, columns = np.mgrid[:height, :width]
    mask = np.hypot(rows - round(y), columns - round(x)) <= radius
    for _ in range(int(draw.integers(1, 5))):
        angle, length = float(draw.uniform(0, 2 * math.pi)), side * float(draw.uniform(0.1, 0.5))
        dy, dx = length * math.sin(angle), length * math.cos(angle)
        # The distance of each pixel from the way gone.
        along = np.clip(((rows - y) * dy + (columns - x) * dx) / length**2, 0, 1)
        mask |= np.hypot(rows - y - along * dy, columns - x - along * dx) <= radius
        y, x = min(max(y + dy, 0.0), height - 1.0), min(max(x + dx, 0.0), width - 1.0)
    return mask


def beside(x0: Float[Tensor, "b c h w"], places: Sequence[int], *key: SupportsIndex | str) -> Float[Tensor, "b k h w"]:
    """Return what a network that fills in sees beside its input (B, 1 + C, H, W): equation (1).

    Arguments:
        x0: The pictures.
        places: What tells the pictures apart (B,): positions in the run, or indices in the data.
        key: What the masks are for.
    """
    masks = torch.stack([random_mask(*x0.shape[2:], *key, int(place)) for place in places])[:, None].to(x0)
    return torch.cat([masks, x0 * (1 - masks)], 1)
