r"""Exact trajectories: what a fitted solver is measured against.

Samples are solved once with many steps; where they are in between, and what the model estimates there, is kept at the
nodes of a fine grid uniform in lambda, of which a solver's own steps are a few.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import close, ends
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import run, start
from reverie.diffusion.samplers.dpmpp import DPMpp3M

FINE = 128  # nodes of the fine grid


@dataclass(frozen=True)
class Trajectories:
    """Exact trajectories of one model, from noise to data.

    Arguments:
        denoiser: The model.
        known: The levels of the fine grid, without t = 0, n of them.
        x: Where the samples are at each (n, M, *D).
        x0: The estimates there (n, M, *D).
        end: Where they end (M, *D).
        share: For how much each sample counts (M,), 1 in all; evenly where nothing is said.
        numbers: How many numbers a sample has; those that are there, where nothing is said.
        scale: What each sample's error is divided by (M,); 1 where nothing is said.
        part: For how much the set counts beside others.
    """

    denoiser: Denoiser
    known: list[Level]
    x: Tensor
    x0: Tensor
    end: Data
    share: Float[Tensor, " m"] = dataclasses.field(default_factory=lambda: torch.empty(0))
    numbers: int = 0
    scale: Float[Tensor, " m"] = dataclasses.field(default_factory=lambda: torch.empty(0))
    part: float = 1.0

    def __post_init__(self) -> None:
        count = len(self.end)
        share = self.share if len(self.share) else torch.full((count,), 1 / count, dtype=torch.float64)
        scale = self.scale if len(self.scale) else torch.ones(count, dtype=torch.float64)
        object.__setattr__(self, "share", share.to(self.end.device))
        object.__setattr__(self, "scale", scale.to(self.end.device))
        object.__setattr__(self, "numbers", self.numbers or self.end[0].numel())

    @property
    def even(self) -> Float[Tensor, " m"]:
        """What each sample's numbers (M,) are multiplied by, for a sum of squares to be the mean over both."""
        return (self.share / self.numbers).sqrt() / self.scale

    def rows(self, index: Sequence[int] | Tensor) -> "Trajectories":
        """Return those of some of the samples, which count evenly."""
        x, x0, scale = self.x[:, index], self.x0[:, index], self.scale[index]
        share = torch.full_like(scale, 1 / len(scale))
        return dataclasses.replace(self, x=x, x0=x0, end=self.end[index], share=share, scale=scale)


def trajectories(
    denoiser: Denoiser,
    x: Data,
    steps: int = FINE,
    progress: Callable[[int], None] | None = None,
    substeps: int = 1,
) -> Trajectories:
    """Return the trajectories from noise x (M, *D) at t = 1, by DPM-Solver++(3M) on a fine grid uniform in lambda.

    Arguments:
        denoiser: The model.
        x: The noise.
        steps: The grid's nodes.
        progress: Called with the evaluations done.
        substeps: Steps from one node to the next.
    """
    schedule, sampler = denoiser.schedule, DPMpp3M()
    first, last = ends(schedule)
    times = schedule.time(torch.linspace(first, last, (steps - 1) * substeps + 1, dtype=torch.float64))
    times[0], times[-1] = 1.0, schedule.t_min
    grid = close(times)
    xs, estimates, here = [], [], x
    for k, state in enumerate(run(sampler, denoiser, sampler.init(x, 1.0), grid, Noise(range(len(x))))):
        if k % substeps == 0:
            xs.append(here)
            estimates.append(state.x0)
        here = state.x
        if progress:
            progress(k + 1)
    nodes = levels(schedule, grid[:-1:substeps].tolist())
    return Trajectories(denoiser, nodes, torch.stack(xs), torch.stack(estimates), here)


def noise(denoiser: Denoiser, shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Data:
    """Return the noise (M, *shape) at t = 1 that the samples of some seeds start from."""
    return start(DPMpp3M(), denoiser.schedule, shape, 1.0, Noise(seeds), device).x
