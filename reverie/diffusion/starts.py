r"""Which starts a solver is fitted to: among them those at a border, which make most of the root mean square.

A few starts in a hundred, or in ten thousand, lie so near a border that a solver takes them to the wrong side. Drawn
evenly, next to none is there to learn from. A solver ends where the flow Phi would have from a start beside its own, so
that it errs by

    e = |Phi(x + delta) - Phi(x)| ~ s |delta| / h,    s = |Phi(x + h u) - Phi(x)|,                         (1)

with u a random direction and h small. What can be told from a start at a border, on whichever side, is delta; and as
a start at a distance d from it ends on the wrong side where |delta| exceeds d, their share is in proportion to the mean
of |delta| there. Borders are found on circles of noise: with x and y drawn evenly, so is every

    x(a) = x cos a + y sin a,                                                                              (2)

and where such circles cross a border the crossings lie as densely as starts would. Of a quarter of a circle that half
is kept, again and again, whose two ends end farther from each other. Errors count by e / s.

The better a solver, the nearer to a border the starts that it takes to the wrong side, and the fewer. To tell how many
they are, and so its root mean square error, starts are drawn at angles a + u beside the crossing at a, as many for each
power of ten of |u|; drawn evenly, there would be fewer in proportion to |u|, so that

    E |e|^2 ~ sum_i |u_i| |e_i|^2 / sum_i |u_i|                                                          (3)

up to a factor that is the same for all solvers: importance sampling. Ten thousand such starts mostly say it to within
a tenth, where of as many drawn evenly one may end on the wrong side, or none.

References:
    Elliptical slice sampling (Murray, Adams & MacKay, 2010): circles (2)
    https://arxiv.org/abs/1001.0175
    Monte Carlo theory, methods and examples (Owen, 2013): importance sampling, chapter 9, (9.7)
    https://artowen.su.domains/mc/
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.levels import levels
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import run
from reverie.diffusion.samplers.dpmpp import DPMpp3M
from reverie.diffusion.trajectories import FINE, Trajectories

Circles = Callable[[Float[Tensor, " m"]], Data]  # equation (2): the starts (M, *D) at some angles (M,), each on its own

ASIDE = 1e-3  # h of (1), in deviations of the noise
ROUGH = 32  # steps in which borders and s are found
HALVINGS = (5, 7, 9)  # of a quarter of a circle, in turn: from 3 degrees around a border to a fifth of one
NEARER = (7, 9, 11)  # where many steps are taken
MANY = 10  # steps, from which on their errors are so small that borders must be known better
CLOSE = 128  # steps in which those are found
BESIDE = (1e-5, 0.5)  # the least and the most |u| of (3), in radians
CROSSING = 17  # halvings, until the least of them
LEAST = 0.1  # of the middle s, at the least
BORDER = 9.0  # for how much a set of starts at borders counts, beside one that is drawn evenly


def solved(denoiser: Denoiser, x: Data, steps: int) -> Data:
    """Return where noise x (M, *D) at t = 1 ends, by DPM-Solver++(3M) in so many steps uniform in lambda."""
    sampler = DPMpp3M()
    grid = uniform_log_snr(denoiser.schedule, steps)
    *_, last = run(sampler, denoiser, sampler.init(x, 1.0), grid, Noise(range(len(x))), previews=False)
    return last.x


def sensitivity(denoiser: Denoiser, x: Data, steps: int = ROUGH, seed: int = 0) -> Float[Tensor, " m"]:
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
    return apart(*(solved(denoiser, start, steps) for start in (x, x + aside))).to(x.device)


def circles(x: Data, y: Data) -> Circles:
    """Return the circles (2) through two noises (M, *D)."""

    def turned(angle: Float[Tensor, " m"]) -> Data:
        cos, sin = (part.to(x).reshape(-1, *[1] * (x.ndim - 1)) for part in (angle.cos(), angle.sin()))
        return cos * x + sin * y

    return turned


def at_borders(
    denoiser: Denoiser,
    around: Circles,
    count: int,
    halvings: Sequence[int] = HALVINGS,
    steps: int = ROUGH,
    seed: int = 0,
) -> Data:
    """Return a start (M, *D) near a border on each of some circles.

    Arguments:
        denoiser: The model.
        around: The circles.
        count: How many they are.
        halvings: How often their quarters are halved, in turn: the more, the nearer the borders.
        steps: Steps of each solution, of which there are 2 more than halvings.
        seed: Seed of the place in the part that is left.

    Example:
        >>> from reverie.diffusion.oracles import random_mixture
        >>> from reverie.diffusion.schedules import linear
        >>> x, y = (normal((100, 2), seed, "example").double() for seed in (0, 1))
        >>> oracle = random_mixture(2, 0, linear())
        >>> found = at_borders(oracle, circles(x, y), 100)
        >>> bool(sensitivity(oracle, found).mean() > 5 * sensitivity(oracle, x).mean())
        True
    """
    wanted = torch.tensor(halvings)[torch.arange(count) % len(halvings)]
    low, high = narrowed(denoiser, around, wanted, steps)
    place = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return around(low + place * (high - low))


def narrowed(
    denoiser: Denoiser, around: Circles, wanted: Int[Tensor, " m"], steps: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the least and the greatest angle of what is left of each quarter after so many halvings as are wanted."""
    count = len(wanted)
    low, high = torch.zeros(count, dtype=torch.float64), torch.full((count,), math.pi / 2, dtype=torch.float64)
    first, last = (solved(denoiser, around(angle), steps) for angle in (low, high))
    for done in range(int(wanted.max())):
        middle = (low + high) / 2
        between = solved(denoiser, around(middle), steps)
        left = apart(first, between) > apart(between, last)
        down, up = left & (done < wanted), ~left & (done < wanted)
        low, high = torch.where(up, middle, low), torch.where(down, middle, high)
        first[up.to(first.device)], last[down.to(last.device)] = between[up], between[down]
    return low, high


def beside_borders(
    denoiser: Denoiser, around: Circles, count: int, numbers: int, steps: int = FINE, seed: int = 0
) -> Trajectories:
    """Return the two ends of trajectories from beside a border on each of some circles, which count by (3).

    Arguments:
        denoiser: The model, in float64, for angles as small as (3) asks.
        around: The circles.
        count: How many they are.
        numbers: How many numbers a sample has.
        steps: Steps of the exact solution.
        seed: Seed of the angles.

    Example:
        >>> from reverie.diffusion.oracles import random_mixture
        >>> from reverie.diffusion.schedules import linear
        >>> x, y = (normal((50, 2), seed, "example").double() for seed in (0, 1))
        >>> found = beside_borders(random_mixture(2, 0, linear()), circles(x, y), 50, 2)
        >>> bool((found.share.max() > 1000 * found.share.min()) & (found.share.sum() - 1 < 1e-9))
        True
    """
    low, high = narrowed(denoiser, around, torch.full((count,), CROSSING), CLOSE)
    random = torch.Generator().manual_seed(seed)
    even = (torch.randperm(count, generator=random) + torch.rand(count, generator=random, dtype=torch.float64)) / count
    least, most = map(math.log, BESIDE)
    away = (least + (most - least) * even).exp()
    side = torch.randint(2, (count,), generator=random) * 2 - 1
    found = two_ends(denoiser, around((low + high) / 2 + side * away), None, steps, numbers)
    return replace(found, share=(away / away.sum()).to(found.end.device))


def apart(x: Data, y: Data) -> Float[Tensor, " m"]:
    """Return how far apart samples are, on the CPU."""
    return (x - y).double().flatten(1).norm(dim=1).cpu()


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
        sensitive: What errors are divided by (M,), where they are: of starts at borders.
        steps: Steps of the exact solution.
        numbers: How many numbers a sample has; those that are there, where nothing is said.
    """
    schedule = denoiser.schedule
    known = levels(schedule, uniform_log_snr(schedule, steps)[:-1].tolist())
    scale, part = (torch.empty(0), 1.0) if sensitive is None else (sensitive, BORDER)
    end = solved(denoiser, x, steps)
    return Trajectories(denoiser, known, x[None], x[None], end, numbers=numbers, scale=scale, part=part)


def stages(
    denoiser: Denoiser,
    x: Data,
    around: Circles,
    groups: int,
    numbers: int,
    counts: Sequence[int],
    steps: int = FINE,
    many: bool = False,
) -> list[list[Trajectories]]:
    """Return what a solver is polished on in each of some stages: starts drawn evenly, and as many at borders.

    Arguments:
        denoiser: The model.
        x: Noise (M, *D) at t = 1, so many groups of as many each: the evenly drawn starts of all stages.
        around: As many circles, in groups as well.
        groups: The groups.
        numbers: How many numbers a sample has.
        counts: How many of each group a stage takes; no start is in two. Together they are M / groups.
        steps: Steps of the exact solutions.
        many: The solver has MANY steps, or more.
    """
    halvings, quick = (NEARER, CLOSE) if many else (HALVINGS, ROUGH)
    near = at_borders(denoiser, around, len(x), halvings, quick)
    sensitive = bounded(sensitivity(denoiser, near, quick))
    index, found = torch.arange(len(x)).reshape(groups, -1), []
    for rows in (part.flatten() for part in index.split(list(counts), dim=1)):
        border = two_ends(denoiser, near[rows], sensitive[rows], steps, numbers)
        found.append([two_ends(denoiser, x[rows], None, steps, numbers), border])
    return found
