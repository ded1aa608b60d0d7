"""Sample grids as a run goes on: the averaged weights, the same noise every time."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from reverie.models.model import Model
from reverie.models.pictures import grid_picture
from reverie.training.masks import random_mask


def preview(model: Model, count: int, steps: int, seed: int, prompts: Sequence[str] | None = None) -> Image:
    """Return a grid of samples by DDIM: with classes, a column for each, the class's own noise in it; or of prompts."""
    classes = len(model.card.classes)
    own = model.card.sampling.sampler not in ("ddim", "auto")  # few steps by training have a sampler that goes with it
    sampler, grid = (None, None) if own else ("ddim", "trailing")
    most = min(steps, getattr(model.denoiser.schedule, "timesteps", steps))
    labels = [i % classes for i in range(count)] if classes else None
    samples = model.sample(count, seed=seed, classes=labels, prompt=prompts, sampler=sampler, grid=grid, steps=most)
    return grid_picture(samples.uint8, columns=classes if 2 <= classes <= 16 else None)


def filled(model: Model, images: UInt8[Tensor, "n c h w"], steps: int, seed: int) -> Image:
    """Return a grid of pairs: a picture with a part of it in grey, and the picture with that part drawn anew.

    Arguments:
        model: One that fills in.
        images: The pictures.
        steps: Of the sampler.
        seed: The first one's.
    """
    most = min(steps, getattr(model.denoiser.schedule, "timesteps", steps))
    cells = []
    for i, image in enumerate(images):
        mask = random_mask(*image.shape[1:], "preview", i)[None]
        told: dict[str, Any] = {"prompt": ""} if model.card.text is not None else {}
        drawn = model.edit(image, mask=mask.to(torch.uint8) * 255, seed=seed + i, sampler="ddim", grid="trailing",
                           steps=most, **told)  # fmt: skip
        cells += [torch.where(mask, 128, image).to(torch.uint8), drawn.uint8[0]]
    return grid_picture(torch.stack(cells), columns=2 * max(1, math.isqrt(len(images))))


def preview_path(folder: Path, step: int) -> Path:
    """Return where the grid of a step lies."""
    return folder / "samples" / f"step-{step:08d}.png"


def png_bytes(picture: Image) -> bytes:
    """Return a picture as a PNG file's bytes."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(picture: Image) -> UInt8[Tensor, "c h w"]:
    """Return a picture as a tensor (C, H, W)."""
    array = np.asarray(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).copy()).permute(2, 0, 1)
