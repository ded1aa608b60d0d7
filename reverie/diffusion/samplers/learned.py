r"""A solver whose times and weights were fitted to a model: what `tune` finds.

Any multistep solver for the data estimate is a table: at step k, from rho_k to rho_(k+1) (rho = sigma /
alpha, z = x / alpha),

    z_(k+1) = f_k (rho_(k+1) / rho_k) z_k + (1 - rho_(k+1) / rho_k) sum_j c_kj D_j,                  (1)

with f_k = 1, DDIM's table the identity and the published solvers' made of polynomials. Here the times, the c_kj and
the f_k are numbers that were fitted (tuning.py): f_k leaves more noise in z, or less, than its time stands for, so
that (1) is every explicit rule that asks once a step and adds up what it has. The last step goes to rho = 0, where it
is the sum alone. The first need not begin at t = 1: noise alone is taken for data noised to a lower rho_0. What little
there is of the data at so much noise is soon made up for, and an estimate there says next to nothing of the sample.

References:
    S4S: Solving for a Diffusion Model Solver (Frankel et al., 2025)
    https://arxiv.org/abs/2502.17423
    DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics (Zheng et al., 2023)
    https://arxiv.org/abs/2310.13268
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.levels import Level, levels, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask, run
from reverie.diffusion.samplers.history import History
from reverie.diffusion.schedules import Schedule

NEAR = 1e-3  # how far from its own lambda a step may be


@dataclass(frozen=True)
class Recipe:
    """The times and weights of a solver of N steps.

    Arguments:
        lam: lambda at the start of each step (N,), rising. At the first x is noise alone; one before that of t = 1, or
            less than 0.001 after it, is that of t = 1.
        weights: c_kj of (1): row k holds those of the estimates at k, k - 1, ..., at most k + 1 of them.
        kept: f_k of (1) of all steps but the last (N - 1,); 1 where nothing is said.

    Raises:
        UsageError: The numbers do not make a solver.

    Example:
        >>> Recipe((-5.0, 0.0), ((1.0,), (1.5, -0.5))).steps
        2
    """

    lam: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    kept: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", self.kept or (1.0,) * (len(self.lam) - 1))
        rows = [len(row) for row in self.weights]
        if not rows or len(rows) != len(self.lam) or any(not 1 <= n <= k + 1 for k, n in enumerate(rows)):
            raise UsageError(f"a recipe has a row of 1 to k + 1 weights for each lambda; {len(self.lam)} have {rows}")
        if any(b <= a for a, b in zip(self.lam, self.lam[1:], strict=False)):
            raise UsageError(f"a recipe's lambdas rise; these are {self.lam}")
        if len(self.kept) != len(self.lam) - 1:
            raise UsageError(f"a recipe of {len(self.lam)} steps keeps of all but the last; {len(self.kept)} are given")
        if not all(math.isfinite(c) for row in (*self.weights, self.kept) for c in row):
            raise UsageError("a recipe's weights are finite numbers; one of these is not")

    @property
    def steps(self) -> int:
        """The number of steps, each an evaluation."""
        return len(self.lam)

    @property
    def past(self) -> int:
        """How many past estimates it needs."""
        return max(len(row) for row in self.weights) - 1

    def grid(self, schedule: Schedule) -> Float[Tensor, " n"]:
        """Return its times on a schedule (N + 1,), the first of them in (0, 1], the last 0.

        Raises:
            UsageError: The schedule begins with less noise than the recipe's second step.

        Example:
            >>> from reverie.diffusion.schedules import Flow
            >>> Recipe((-1.0, 0.0), ((1.0,), (1.0,))).grid(Flow())
            tensor([0.7311, 0.5000, 0.0000], dtype=torch.float64)
        """
        times = schedule.time(2 * torch.tensor(self.lam, dtype=torch.float64))
        if self.lam[0] <= schedule.log_snr(torch.ones(1, dtype=torch.float64)).item() / 2 + NEAR:
            times[0] = 1.0
        if self.steps > 1 and not bool(times[1] < times[0]):
            raise UsageError("this recipe is for a schedule that begins with more noise than this one")
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def factors(self, k: int, here: Level, there: Level) -> tuple[float, float]:
        """Return what step k keeps of x, and the factor on the estimates' sum: equation (1) in x instead of z."""
        keep, gain = factors(here, there)
        return keep * (*self.kept, 1.0)[k], gain


def factors(here: Level, there: Level) -> tuple[float, float]:
    """Return what is kept of x, and the factor on the estimates' sum, of a step that keeps no more and no less."""
    keep = there.sigma / here.sigma
    return keep, there.alpha - keep * here.alpha


class Ledger(Denoiser):
    """A denoiser whose estimates are the axes of a space, one after the other: what is made of them can be read off.

    Arguments:
        schedule: The schedule.
        axes: How many there are; x starts on the first.
    """

    def __init__(self, schedule: Schedule, axes: int) -> None:
        super().__init__()
        self.schedule, self.axes, self.seen = schedule, axes, list[Tensor]()

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        self.seen.append(x)
        x0 = torch.zeros_like(x)
        x0[:, min(len(self.seen), self.axes - 1)] = 1
        alpha, sigma = self.schedule.marginal(t)
        return Estimate(x0, (x - alpha[:, None] * x0) / sigma[:, None])


def as_recipe(sampler: Sampler, schedule: Schedule, grid: Float[Tensor, " n"]) -> Recipe:
    """Return a linear multistep sampler on a grid as a recipe: the same steps, to rounding.

    Arguments:
        sampler: A deterministic sampler that asks once a step, at the grid's times.
        schedule: The schedule.
        grid: The times (N + 1,).

    Raises:
        UsageError: The sampler asks more often, or less.

    Example:
        >>> from reverie.diffusion.grids import trailing
        >>> from reverie.diffusion.registry import samplers, schedules
        >>> as_recipe(samplers["ddim"](), schedules["flow"](), trailing(schedules["flow"](), 2)).weights
        ((1.0,), (1.0,))
    """
    known, steps = levels(schedule, grid.tolist()), len(grid) - 1
    ledger = Ledger(schedule, steps + 1)
    x = torch.zeros(1, steps + 1, dtype=torch.float64)
    x[0, 0] = 1
    *_, last = run(sampler, ledger, sampler.init(x, grid[0].item()), grid, Noise([0]))
    points, rows = [*ledger.seen, last.x], []
    if len(points) != steps + 1:
        raise UsageError(
            f"{type(sampler).__name__} asks {len(ledger.seen)} times in {steps} steps; a recipe, once a step"
        )
    for k in range(steps):
        keep, gain = factors(known[k], known[k + 1])
        row = ((points[k + 1] - keep * points[k])[0] / gain)[1 : k + 2].flip(0).tolist()
        while len(row) > 1 and abs(row[-1]) < 1e-9:
            row.pop()
        rows.append(tuple(row))
    return Recipe(tuple(max(level.lam, -100.0) for level in known[:-1]), tuple(rows))


@dataclass(frozen=True)
class Learned(Sampler):
    """A fitted multistep solver, one evaluation a step, on its own grid.

    Arguments:
        recipe: Its times and weights.

    Raises:
        UsageError: On a step: it is not one of the recipe's.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe((0.0,), ((1.0,),)))
    linear: ClassVar[bool] = True

    def remember(self, x: Data) -> dict[str, Tensor]:
        return History.empty(x, self.recipe.past)

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        for here, there, k in zip(step.here, step.there, step.k, strict=True):
            self.check(here, there, k)
        x0 = ask(denoiser, state.x, state.t).x0
        past = History.of(state, self.recipe.past)
        rows = [self.recipe.weights[k] for k in step.k]
        of_step = map(self.recipe.factors, step.k, step.here, step.there)
        keep, gain = zip(*of_step, strict=True)
        terms = [(list(keep), state.x)]
        for j, estimate in enumerate([x0, *past.values]):
            terms.append(([g * (row[j] if j < len(row) else 0.0) for g, row in zip(gain, rows, strict=True)], estimate))
        return replace(state, x=weighted(terms), x0=x0, memory=past.push(x0, step.here))

    def check(self, here: Level, there: Level, k: int) -> None:
        """Refuse a step that is not the recipe's step k."""
        due = (*self.recipe.lam, math.inf)
        right = k < self.recipe.steps and (k == 0 or abs(here.lam - due[k]) < NEAR)
        if not right or not (there.lam == due[k + 1] or abs(there.lam - due[k + 1]) < NEAR):
            raise UsageError(
                f"step {k + 1} from t = {here.t:g} to {there.t:g} is not one of this fitted solver, "
                f"which has {self.recipe.steps} steps on its own grid"
            )
