r"""Which starts a solver is fitted to: among them those between two ends, which make most of the root mean square.

A few starts in a hundred, or in ten thousand, lie so near a border that a solver takes them to the wrong side. Drawn
evenly, too few are there to learn from. A solver ends where the flow Phi would have from a start beside its own, so
that it errs by

    e = |Phi(x + delta) - Phi(x)| ~ s |delta| / h,    s = |Phi(x + h u) - Phi(x)|,                         (1)

with u a random direction and h small. What can be told from any start is delta; and as a start at a distance d from a
border ends on the wrong side where |delta| exceeds d, their share is in proportion to |delta| at the border. So out of
many starts some are drawn with a chance in proportion to s, and their errors count by e / s. (Counted by one over how
likely they were drawn, and not divided, the same starts give the root mean square itself, but the few that end wrong
would then be all that is seen, and their derivatives say little of where to go.)

References:
    Simulation and the Monte Carlo Method (Rubinstein & Kroese, 2016): importance sampling
    https://doi.org/10.1002/9781118631980
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.levels import levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import run
from reverie.diffusion.samplers.dpmpp import DPMpp3M
from reverie.diffusion.trajectories import FINE, Trajectories

ASIDE = 1e-3  # h of (1), in deviations of the noise
QUICK = 8  # steps in which s is found: roughly will do
LEAST = 0.1  # of the middle s, at the least


def solved(denoiser: Denoiser, x: Data, steps: int) -> Data:
    """Return where noise x (M, *D) at t = 1 ends, by DPM-Solver++(3M) in so many steps uniform in lambda."""
    sampler = DPMpp3M()
    grid = uniform_log_snr(denoiser.schedule, steps)
    *_, last = run(sampler, denoiser, sampler.init(x, 1.0), grid, Noise(range(len(x))), previews=False)
    return last.x


def sensitivity(denoiser: Denoiser, x: Data, steps: int = QUICK, seed: int = 0) -> Float[Tensor, " m"]:
    """Return how far apart the ends of each start and of one beside it are: s of (1), in float64.

    Arguments:
        denoiser: The model.
        x: Noise (M, *D) at t = 1.
        steps: Steps of either solution: 2 steps evaluations in all.
        seed: Seed of the directions.

    Example:
        >>> from reverie.diffusion.oracles import random_mixture
        >>> from reverie.diffusion.schedules import linear
        >>> x = normal((500, 2), 0, "example").double()
        >>> s = sensitivity(random_mixture(2, 0, linear()), x)
        >>> bool(s.max() > 20 * s.median())
        True
    """
    scale = float(denoiser.schedule.prior_std(torch.ones(1, dtype=torch.float64)))
    aside = normal(x.shape, seed, "aside").to(x) * (ASIDE * scale)
    ends = [solved(denoiser, start, steps).double().flatten(1) for start in (x, x + aside)]
    return (ends[1] - ends[0]).norm(dim=1)


def between(sensitive: Float[Tensor, " m"], count: int, seed: int = 0, groups: int = 1) -> Int64[Tensor, " n"]:
    """Return some of the starts, drawn without replacement with a chance in proportion to their sensitivity.

    Arguments:
        sensitive: s of all starts (M,).
        count: How many of each group.
        seed: Seed of the draw.
        groups: The starts are so many groups, of as many each, and of each the same number is drawn.
    """
    random = torch.Generator().manual_seed(seed)
    rows = bounded(sensitive).cpu().reshape(groups, -1)
    drawn = torch.multinomial(rows, count, generator=random)
    return (drawn + rows.shape[1] * torch.arange(groups)[:, None]).flatten()


def bounded(sensitive: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return sensitivities of which none is far below the others, in units of the middle one."""
    return (sensitive / sensitive.median().clamp(min=1e-30)).clamp(min=LEAST)


def two_ends(
    denoiser: Denoiser,
    x: Data,
    sensitive: Float[Tensor, " m"] | None = None,
    steps: int = FINE,
    numbers: int = 0,
) -> Trajectories:
    """Return the two ends of exact trajectories, for polishing.

    Arguments:
        denoiser: The model.
        x: Noise (M, *D) at t = 1.
        sensitive: What errors are divided by (M,), where they are.
        steps: Steps of the exact solution.
        numbers: How many numbers a sample has; those that are there, where nothing is said.
    """
    schedule = denoiser.schedule
    known = levels(schedule, uniform_log_snr(schedule, steps)[:-1].tolist())
    scale = torch.empty(0) if sensitive is None else sensitive
    return Trajectories(denoiser, known, x[None], x[None], solved(denoiser, x, steps), numbers=numbers, scale=scale)


def stages(
    denoiser: Denoiser, x: Data, groups: int, numbers: int, counts: Sequence[int], steps: int = FINE
) -> list[list[Trajectories]]:
    """Return what a solver is polished on in each of some stages: starts drawn evenly, and as many between two ends.

    Arguments:
        denoiser: The model.
        x: Noise (M, *D) at t = 1 to draw from, so many groups of as many each.
        groups: The groups.
        numbers: How many numbers a sample has.
        counts: How many are drawn evenly of each group, stage by stage; no start is drawn so in two.
        steps: Steps of the exact solutions.
    """
    sensitive, offset = sensitivity(denoiser, x), len(x) // groups * torch.arange(groups)[:, None]
    found, first = [], 0
    for stage, count in enumerate(counts):
        even = (offset + first + torch.arange(count)).flatten()
        rows, first = between(sensitive, count, stage, groups), first + count
        border = two_ends(denoiser, x[rows], bounded(sensitive)[rows], steps, numbers)
        found.append([two_ends(denoiser, x[even], None, steps, numbers), border])
    return found
