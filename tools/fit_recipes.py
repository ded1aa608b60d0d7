"""Fit the solvers that `--sampler auto` uses where a model has none of its own, and write them into the package.

    python tools/fit_recipes.py --schedules linear,cosine

They are fitted, by reverie.diffusion.tuning, to mixtures of Gaussians that are drawn by seeds which nothing else uses;
no network is among them. There are four for each schedule and number of steps: for samples of fewer than 16 numbers,
of fewer than 40, of fewer than 2048, and of more. As in `tune`, half of the starts lie at borders
(reverie.diffusion.starts). On mixtures that it was not fitted to, a new solver is set beside the one that the file has
and beside published ones, and the best of them is kept. What is not named stays as it is.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.levels import levels
from reverie.diffusion.oracle_stack import MixtureStack, random_circles, random_stack
from reverie.diffusion.polish import attempt, polish
from reverie.diffusion.recipes import FILE, of_row
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.exponential import step_weights
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.starts import Circles, stages
from reverie.diffusion.trajectories import Trajectories, trajectories
from reverie.diffusion.tuning import PAST, judged, published, tune

STEPS = (5, 10, 20, 15, 8, 6, 4, 3, 2, 1, 7, 9, 12, 11, 13, 14, 16, 18, 50, 30)
DIMENSIONS = {"points": (2, 4), "few": (16,), "small": (64,), "large": (768, 3072)}
FIRST_SEED, TEST_SEED, MIXTURES = 1_000_000, 2_000_000, 6  # seeds of the mixtures; how many of them
FIRST, MORE, TEST = 64, 96, 500  # starts of each, drawn evenly: to walk along, to polish on in a stage, to judge by
EXACT = 300  # steps of the exact solutions
WALKS, ROUNDS, STAGES = 10, 12, 2
MANY = 20  # steps, above which published solvers are polished and no grids are walked


class Lessons(NamedTuple):
    """What solvers of one size are fitted to and judged by: one of each for each dimension."""

    walked: list[Trajectories]
    stages: list[list[Trajectories]]
    judging: list[Trajectories]

    @staticmethod
    def of(schedule: Schedule, dimensions: Sequence[int]) -> "Lessons":
        """Return those of a schedule."""
        walked, fitting, judging = [], [], []
        for d in dimensions:
            walked.append(replace(trajectories(*drawn(schedule, d, FIRST_SEED, FIRST, "walking")[:2]), numbers=d))
            starts = drawn(schedule, d, FIRST_SEED, MORE * STAGES, "recipes")
            fitting.append(stages(*starts, MIXTURES, d, [MORE] * STAGES, EXACT))
            judging += stages(*drawn(schedule, d, TEST_SEED, TEST, "recipes"), MIXTURES, d, [TEST], EXACT)[0]
        return Lessons(walked, [list(chain(*stage)) for stage in zip(*fitting, strict=True)], judging)


def drawn(
    schedule: Schedule, dimension: int, seed: int, count: int, purpose: str
) -> tuple[MixtureStack, Float[Tensor, "b d"], Circles]:
    """Return some mixtures, and so many starts of each, drawn evenly and on circles."""
    what = dimension, range(seed, seed + MIXTURES), count, schedule, purpose
    return *random_stack(*what), random_circles(*what)


def fit(lessons: Lessons, steps: int, known: Sequence[Recipe]) -> Recipe:
    """Return a solver fitted to some starts, then polished on others; of many steps, the best of those known is."""
    if steps <= MANY:
        return tune(lessons.walked, steps, WALKS, ROUNDS, more=known, stages=lessons.stages)[0]
    recipe = judged(lessons.stages[0], list(known))[0][0]
    for stage in lessons.stages:
        recipe, _ = polish(stage, recipe, ROUNDS)
    return recipe


def adams(schedule: Schedule, grid: Float[Tensor, " n"], order: int) -> Recipe:
    """Return the exponential Adams-Bashforth rule of an order (exponential.py, 1 and 3) as a recipe."""
    lam = [level.lam for level in levels(schedule, grid.tolist())]
    rows = []
    for k, (here, there) in enumerate(pairwise(lam)):
        past = lam[max(k - order + 1, 0) : k] if there < math.inf else []
        weights = step_weights(here, there, tuple(reversed(past)), 0.0, "exact")
        rows.append(tuple(weight / -math.expm1(here - there) for weight in weights))
    return Recipe(tuple(lam[:-1]), tuple(rows))


def rounded(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as the file has it."""
    return {
        "lam": [round(value, 6) for value in recipe.lam],
        "weights": [[round(value, 6) for value in row] for row in recipe.weights],
    }


def main() -> None:
    """Fit, and write after each number of steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--schedules", default="linear,scaled-linear,cosine,vp,flow,edm", help="names, with commas")
    parser.add_argument("--sizes", default=",".join(DIMENSIONS), help="with commas")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="with commas")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of recipes")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, size in product(options.schedules.split(","), options.sizes.split(",")):
        began, schedule = time.perf_counter(), schedules[name]()
        lessons = Lessons.of(schedule, DIMENSIONS[size])
        for steps in map(int, options.steps.split(",")):
            table = json.loads(options.out.read_text()) if options.out.exists() else {}
            rows = table.setdefault(name, {}).setdefault(size, {})
            candidates = {f"published {i}": recipe for i, recipe in enumerate(published(lessons.judging, steps))}
            if steps > MANY:
                candidates["adams"] = adams(schedule, uniform_log_snr(schedule, steps), PAST + 1)
            if str(steps) in rows:
                candidates["kept"] = of_row(rows[str(steps)])
            candidates["fitted"] = fit(lessons, steps, list(candidates.values()))
            errors = {
                word: found[1] for word, recipe in candidates.items() if (found := attempt(lessons.judging, recipe))
            }
            best = min(errors, key=lambda word: errors[word])
            rows[str(steps)] = rounded(candidates[best])
            options.out.write_text(json.dumps(table, separators=(",", ":")) + "\n")
            others = {word: round(value, 2) for word, value in errors.items() if not word.startswith("published")}
            least = min((value for word, value in errors.items() if word.startswith("published")), default=0.0)
            print(f"{name} {size} {steps}: {best} of {others}, published {least:.2f}, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
