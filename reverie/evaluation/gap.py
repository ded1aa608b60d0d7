r"""Memorised or learned: the denoising loss on images of the training set beside that on images held out.

    l(x) = mean over times t of |E(x_t, t) - eps|^2 / d,    gap = mean_held-out l - mean_training l,   (1)

with noise that is fixed for each image. A network that has learned the data and not its images has a gap of zero within
its error; one that knows its images by heart denoises them better, first at the middle noise levels.

References:
    Why Diffusion Models Don't Memorize (Bonnaire et al., 2025)
    https://arxiv.org/abs/2505.17638
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import normals
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.dequantisation import evaluating
from reverie.diffusion.objectives import Simple
from reverie.diffusion.times import level_times
from reverie.evaluation.likelihood import Conditions, Tick, batches, device_of, nothing


@dataclass(frozen=True)
class Gap:
    """The losses of two sets of images and their difference.

    Arguments:
        training: The mean loss on images that were trained on.
        held_out: That on images that were not.
        standard_error: Of their difference.
    """

    training: float
    held_out: float
    standard_error: float

    @property
    def value(self) -> float:
        """held_out - training: above zero where images were learned by heart."""
        return self.held_out - self.training


@torch.no_grad()
def denoising_losses(
    denoiser: Denoiser,
    images: UInt8[Tensor, "n *d"],
    conditions: Conditions = nothing,
    name: str = "",
    batch_size: int = 64,
    tick: Tick | None = None,
) -> Float[Tensor, " n"]:
    """Return l (1) of each image (N,), the mean over ten noise levels.

    Arguments:
        denoiser: The model.
        images: Bytes (N, *D).
        conditions: What the network is told of some rows of them.
        name: Sets the noise of two sets apart.
        batch_size: Images at a time.
        tick: Called after each batch with how many are done.
    """
    simple, times, device, found = Simple("eps"), level_times(denoiser.schedule), device_of(denoiser), []
    with evaluating(denoiser):
        for rows in batches(len(images), batch_size, tick):
            x0 = images[rows].to(device) / 127.5 - 1
            keys = [(0, "gap", name, i) for i in range(rows.start, rows.stop)]
            eps, condition = normals(x0.shape[1:], keys).to(device), dict(conditions(rows)) or None
            each = [simple(denoiser, x0, t.expand(len(x0)).to(device), eps, condition) for t in times]
            found.append(torch.stack(each).double().mean(0).cpu())
    return torch.cat(found)


def gap(training: Float[Tensor, " n"], held_out: Float[Tensor, " m"]) -> Gap:
    """Return the gap between losses on training images (N,) and on held-out ones (M,).

    Raises:
        UsageError: There are fewer than two of the one or the other.

    Example:
        >>> gap(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).value
        1.0
    """
    if min(len(training), len(held_out)) < 2:
        raise UsageError(f"{len(training)} training and {len(held_out)} held-out images; a gap needs two of each")
    variance = sum(float(part.double().var()) / len(part) for part in (training, held_out))
    return Gap(
        float(training.double().mean()), float(held_out.double().mean()), math.sqrt(variance)
    )  # fmt: skip
