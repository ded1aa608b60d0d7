"""Fitting a solver to a model as it is sampled: its classes, guidance and clipping; and judging it on other samples."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.polish import judged, squares
from reverie.diffusion.recipes import general
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.schedules import Table
from reverie.diffusion.starts import at_borders, bounded, circles, sensitivity, two_ends
from reverie.diffusion.trajectories import FINE, Trajectories, noise, trajectories
from reverie.diffusion.tuning import published, tune
from reverie.diffusion.walking import follow
from reverie.models.automatic import recipe as recipe_of
from reverie.models.card import FittedSolver
from reverie.models.memory import check_memory, memory_errors
from reverie.models.model import Model
from reverie.models.plan import SamplingPlan, make_plan
from reverie.models.sampling import evaluating, prepared
from reverie.models.settling import whole

QUICK = 16  # steps in which borders are found; sensitivities in twice as many
NUMBERS = 1 << 17  # numbers of all samples that a solver is fitted to, about
WALKS = 20  # candidate grids, by default
BUDGET = 1000  # evaluations of each sample that the rounds of polishing of the best candidate may cost, by default
FIRST_SEED = 1 << 40  # of the samples here, far from those that a user is likely to draw

Report = Callable[[str, int, int, float], None]


def tune_model(
    model: Model,
    steps: Sequence[int],
    *,
    guidance: float | None = None,
    samples: int | None = None,
    walks: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> list[FittedSolver]:
    """Fit a solver to a model for each number of steps. The model itself is left as it is.

    Arguments:
        model: The model.
        steps: Numbers of evaluations.
        guidance: w; of a model with classes, samples of all classes are used; None takes the card's.
        samples: Exact trajectories to fit to, the half of them at borders; as many again are for judging. None: by
            the samples' size, 8 to 64.
        walks: Candidate grids for each number of steps; None: 20.
        rounds: Rounds of polishing, of 3.5 N^2 + 5 N evaluations of each sample for N steps; None: 12, fewer for many
            steps.
        seed: Seed of the trajectories' noise.
        report: Called with what is done, how much of it, of how much, and the error so far.

    Returns:
        The fitted solvers, each with its error and the published solvers' least, on samples they were not fitted to.

    Raises:
        UsageError: An argument is out of range, or there is no class to guide to.
        OutOfMemoryError: There is not enough memory for the trajectories.
    """
    numbers, fine = math.prod(model.card.shape), finest(model)
    count = min(max(NUMBERS // numbers, 8), 64) if samples is None else samples
    for n in steps:
        whole("steps", n, 1, fine - 1)  # fewer than the exact solution has
    for name, value, least in (("samples", count, 2), ("walks", walks, 1), ("rounds", rounds, 0)):
        if value is not None:
            whole(name, value, least, 10_000)
    if not steps:
        raise UsageError("there are no steps to tune for; give a number of evaluations, or several")
    lower = "samples"
    # The trajectories; and the derivatives by 7 numbers a step, a few times over.
    most = 4 * count * numbers * (4 * fine + 70 * max(steps))
    check_memory(most, torch.device("cpu"), f"{count} trajectories of {fine} steps", lower)
    with memory_errors("the trajectories", lower), evaluating(model.denoiser.network), torch.no_grad():
        fitting, judging = (teach(model, count, seed + part, guidance, report) for part in (0, 1))
        found: list[FittedSolver] = []
        for n in sorted(set(steps)):
            found.append(fit(model, n, fitting, judging, found[-1:], walks, rounds, report))
        return found


class Lesson(NamedTuple):
    """What a solver is fitted to, or judged by: trajectories drawn evenly, the two ends of others at borders, and w."""

    even: Trajectories
    border: Trajectories
    guidance: float | None

    @property
    def both(self) -> tuple[Trajectories, Trajectories]:
        """All of them."""
        return self.even, self.border


def finest(model: Model) -> int:
    """Return the steps of the exact solution: a table is not asked at more times than it has."""
    schedule = model.denoiser.schedule
    return min(FINE, schedule.timesteps) if isinstance(schedule, Table) else FINE


def teach(model: Model, count: int, part: int, guidance: float | None, report: Report | None) -> Lesson:
    """Return exact trajectories of some samples, guided and clipped as they would be; half of them at borders."""
    first, few, fine = FIRST_SEED + part * 1_000_000, count // 2, finest(model)
    quick, twice = min(QUICK, fine), min(2 * QUICK, fine)
    plan, (denoiser, x) = begun(model, range(first, first + count - few), guidance)
    told = None if report is None else lambda step: report("exact trajectories", step, fine, math.nan)
    even = trajectories(denoiser, x, fine, told)
    ends = (range(first + n * count, first + n * count + few) for n in (1, 2))
    (_, (denoiser, x)), (_, (_, y)) = (begun(model, seeds, guidance) for seeds in ends)
    if report is not None:
        report("borders", 0, 1, math.nan)
    near = at_borders(denoiser, circles(x, y), few, steps=quick, seed=part)
    border = two_ends(denoiser, near, bounded(sensitivity(denoiser, near, twice)), fine)
    if report is not None:
        report("borders", 1, 1, math.nan)
    return Lesson(even, border, plan.guidance)


def begun(
    model: Model, seeds: Sequence[int], guidance: float | None
) -> tuple[SamplingPlan, tuple[Denoiser, Float[Tensor, "m ..."]]]:
    """Return the plan of some seeds' samples, the denoiser that it makes of the model, and their noise."""
    plan = plan_samples(model, seeds, guidance)
    denoiser = prepared(model.denoiser, plan, range(plan.n), model.device)
    return plan, (denoiser, noise(denoiser, plan.shape, plan.seeds, model.device))


def plan_samples(model: Model, seeds: Sequence[int], guidance: float | None) -> SamplingPlan:
    """Return the plan of some seeds' samples, of all classes in turn: it settles, or refuses, the guidance."""
    names = model.card.classes
    classes = [names[(seed - FIRST_SEED) % len(names)] for seed in seeds] if names else None
    return make_plan(
        model.denoiser, model.card, len(seeds), seed=list(seeds), classes=classes, guidance=guidance,
        steps=1, sampler="ddim", grid="trailing", exact=False, batch_size=len(seeds),
    )  # fmt: skip


def fit(
    model: Model,
    steps: int,
    fitting: Lesson,
    judging: Lesson,
    fewer: Sequence[FittedSolver],
    walks: int | None,
    rounds: int | None,
    report: Report | None,
) -> FittedSolver:
    """Fit one solver, set it beside the published ones on other samples, and keep what is best there.

    It may begin as one of those that were found for fewer steps.
    """
    walks = WALKS if walks is None else walks
    rounds = min(max(2 * BUDGET // (7 * steps**2), 1), 12) if rounds is None else rounds
    told = None
    if report is not None:
        told = lambda done, loss: report(f"{steps} steps", done, max(walks, rounds), math.exp(loss / 2))  # noqa: E731
    ready = general(model.denoiser.schedule, steps, fitting.even.numbers)
    known = [ready] if ready is not None else []
    more = [*known, *map(recipe_of, fewer)]
    recipe, _ = tune([fitting.even], steps, walks, rounds, told, more, [fitting.both])
    others = published(judging.both, steps)
    best = judged(judging.both, [recipe, *known, *others])[0][0]
    return FittedSolver(
        lam=best.lam, weights=best.weights, kept=best.kept, guidance=fitting.guidance,
        error=distance(judging.even, best),
        best_published=min(distance(judging.even, other) for other in others),
    )  # fmt: skip


def distance(exact: Trajectories, recipe: Recipe) -> float:
    """Return a solver's root-mean-square distance from where exact trajectories end."""
    return float(squares(exact, follow(exact, recipe).x[-1]).mean().sqrt())
