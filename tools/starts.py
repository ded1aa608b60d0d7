"""Starts that a solver is fitted to, drawn for where solvers go wrong: between two modes of a mixture.

Of many starts the few near a border, where the flow is sensitive, make the root mean square. Some starts are drawn out
of many, more of them where they are sensitive or where the present solver is wrong, each counting by one over how
likely it was drawn, so that sums over them are still those over all.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.base.randomness import normal
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.oracle_stack import MixtureStack
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.polish import follow, squares
from reverie.diffusion.samplers.dpmpp import DPMpp3M
from reverie.diffusion.samplers.learned import Recipe, as_recipe
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.trajectories import Trajectories, trajectories

MOST = 300  # how much likelier than the mean a start may be, for its sensitivity
EXACT = 300  # steps of the exact solution


@dataclass
class Pool:
    """Many starts of several mixtures of one dimension, and where the exact solution takes them.

    Arguments:
        everything: Their trajectories' two ends.
        near: The starts, moved a little.
        mixtures: How many mixtures there are.
        sensitive: How far apart the exact ends of both are (M,).
        random: What starts are drawn with.
    """

    everything: Trajectories
    near: Tensor
    mixtures: int
    sensitive: Tensor
    random: torch.Generator

    def draw(self, count: int, recipe: Recipe | None = None, fine: int | None = None) -> Trajectories:
        """Return so many starts of each mixture: by how sensitive they are, and how wrong a recipe is there.

        Arguments:
            count: How many.
            recipe: The present solver.
            fine: Nodes of the trajectories; None for their two ends alone.
        """
        parts = [torch.ones_like(self.sensitive), self.sensitive]
        if recipe is not None:
            moved = dataclasses.replace(self.everything, x=self.near[None])
            ends = [follow(one, recipe).x[-1] for one in (self.everything, moved)]
            change = (ends[1] - ends[0]).norm(dim=1)
            parts += [change, change * squares(self.everything, ends[0]).sqrt()]
        chance = torch.stack([self.shares(part) for part in parts]).mean(0)
        index = torch.multinomial(chance, count, replacement=True, generator=self.random)
        share = (1 / chance.gather(1, index)).flatten()
        offset = torch.arange(self.mixtures)[:, None] * chance.shape[1]
        chosen = (index + offset).flatten()
        start, end = self.everything.x[0, chosen], self.everything.end[chosen]
        found = self.everything if fine is None else trajectories(self.everything.denoiser, start, fine)
        if fine is None:
            found = dataclasses.replace(found, x=start[None], x0=start[None])
        return dataclasses.replace(
            found, end=end, share=share / share.sum(), numbers=self.everything.numbers, scale=torch.empty(0)
        )

    def shares(self, part: Tensor) -> Tensor:
        """Return a chance for each start of each mixture."""
        bounded = part.clamp(max=MOST * float(part.mean())).reshape(self.mixtures, -1)
        return bounded / bounded.sum(1, keepdim=True)


def make_pool(dimension: int, seeds: Sequence[int], count: int, schedule: Schedule, purpose: str) -> Pool:
    """Return a pool of so many starts of each of some mixtures, which are drawn by their seeds."""
    scale = float(schedule.prior_std(torch.ones(1, dtype=torch.float64)))
    drawn = [normal((count, dimension), seed, purpose).double() * scale for seed in seeds]
    folded = [random_mixture(dimension, seed, schedule).folded(x) for seed, x in zip(seeds, drawn, strict=True)]
    stack, x = MixtureStack([mixture for mixture, _ in folded]), torch.cat([x for _, x in folded])
    random = torch.Generator().manual_seed(seeds[0])
    aside = torch.randn(x.shape, generator=random, dtype=x.dtype)
    near = x + aside * (1e-3 * scale)
    exact = as_recipe(DPMpp3M(), schedule, uniform_log_snr(schedule, EXACT))
    both = Trajectories(stack, trajectories(stack, x[: len(seeds)]).known, x[None], x[None], x, numbers=dimension)
    end = follow(both, exact).x[-1]
    quick = as_recipe(DPMpp3M(), schedule, uniform_log_snr(schedule, 40))
    ends = [follow(dataclasses.replace(both, x=y[None]), quick).x[-1] for y in (x, near)]
    return Pool(dataclasses.replace(both, end=end), near, len(seeds), (ends[1] - ends[0]).norm(dim=1), random)
