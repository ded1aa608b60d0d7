"""Sample grids as a run goes on: the averaged weights, the same noise every time."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from reverie.models.model import Model
from reverie.models.pictures import grid_picture


def preview(model: Model, count: int, steps: int, seed: int, prompts: Sequence[str] | None = None) -> Image:
    """Return a grid of samples by DDIM: with classes, a column for each, the class's own noise in it; or of prompts."""
    classes = len(model.card.classes)
    own = model.card.sampling.sampler not in ("ddim", "auto")  # few steps by training have a sampler that goes with it
    sampler, grid = (None, None) if own else ("ddim", "trailing")
    most = min(steps, getattr(model.denoiser.schedule, "timesteps", steps))
    labels = [i % classes for i in range(count)] if classes else None
    samples = model.sample(count, seed=seed, classes=labels, prompt=prompts, sampler=sampler, grid=grid, steps=most)
    return grid_picture(samples.uint8, columns=classes if 2 <= classes <= 16 else None)


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
