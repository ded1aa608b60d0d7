"""The held-out loss, per noise level, with noise that never changes: two runs' curves can be compared."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.randomness import normals
from reverie.data.dataset import Dataset
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.objectives import Simple
from reverie.diffusion.times import level_times
from reverie.models.conditioning import Told
from reverie.training.masks import beside
from reverie.training.update import to_unit


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    dataset: Dataset,
    indices: list[int],
    conditions: Callable[[list[int]], Told | None],
    device: torch.device,
    batch_size: int = 64,
    most: int = 128,
    fill: bool = False,
) -> Float[Tensor, " n"]:
    """Return the mean squared error of the noise at each level (LEVELS,), on at most `most` held-out images.

    The same images, noise and masks at every level and every time, whatever the network predicts.
    """
    simple = Simple("eps")
    times = level_times(denoiser.schedule).to(device)
    total = torch.zeros(len(times), dtype=torch.float64)
    chosen = indices[:most]
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        x0 = to_unit(dataset.images(part)).to(device)
        eps = normals(x0.shape[1:], [(0, "validate", int(i)) for i in part]).to(device)
        told = conditions(part)
        condition = {} if told is None else {name: value.to(device) for name, value in told.condition.items()}
        if fill:
            condition["beside"] = beside(x0, part, 0, "validate-mask")
        for k, t in enumerate(times):
            total[k] += float(simple(denoiser, x0, t.expand(len(part)), eps, condition).double().sum())
    return total / len(chosen)
