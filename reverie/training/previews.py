"""Sample grids as a run goes on: the averaged weights, the same noise every time."""

from pathlib import Path

from reverie.models.model import Model
from reverie.models.pictures import grid_picture, picture_bytes


def preview_classes(count: int, classes: int) -> list[int] | None:
    """Return the classes of a preview's images, each row one of them; None without classes.

    Example:
        >>> preview_classes(5, 2)
        [0, 1, 0, 1, 0]
    """
    return [i % classes for i in range(count)] if classes else None


def preview(model: Model, count: int, steps: int, seed: int) -> bytes:
    """Return a grid of samples as the bytes of a PNG."""
    classes = preview_classes(count, len(model.card.classes))
    most = min(steps, getattr(model.denoiser.schedule, "timesteps", steps))
    samples = model.sample(count, seed=seed, classes=classes, sampler="ddim", steps=most, guidance=1.0 if classes else None)
    columns = len(model.card.classes) if 2 <= len(model.card.classes) <= 16 else None
    return picture_bytes(grid_picture(samples.uint8, columns=columns))


def preview_path(folder: Path, step: int) -> Path:
    """Return where the grid of a step lies."""
    return folder / "samples" / f"step-{step:08d}.png"
