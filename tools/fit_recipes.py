"""Fit the solvers that `--sampler auto` uses where a model has none of its own, and write them into the package.

    python tools/fit_recipes.py --schedules linear,cosine

They are fitted, by reverie.diffusion.tuning, to mixtures of Gaussians that are drawn by seeds which nothing else uses;
no network is among them. There are three for each schedule and number of steps: for samples of fewer than 16 numbers,
of fewer than 2048, and of more. On mixtures that it was not fitted to, a new solver is set beside the one that the file
has and beside published ones, and the best of them is kept. What is not named stays as it is.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from starts import Pool, make_pool

from reverie.diffusion.polish import attempt, polish
from reverie.diffusion.recipes import FILE, of_row
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.tuning import published, tune

STEPS = (
    5,
    10,
    20,
    15,
    8,
    6,
    4,
    3,
    2,
    1,
    7,
    9,
    12,
    11,
    13,
    14,
    16,
    18,
)  # with more, published ones are as good, or better
DIMENSIONS = {"points": (2, 4), "small": (16, 64), "large": (768, 3072)}
FIRST_SEED, MIXTURES, STARTS = 1_000_000, 6, 2000
TEST_SEED, TEST_MIXTURES, TEST_STARTS = 2_000_000, 6, 500
FIRST, MORE = 64, 96  # starts of each mixture, for the first fit and for polishing it
FINE = 128
WALKS, ROUNDS, STAGES = 10, 12, 2


def fit(pools: Sequence[Pool], first: Sequence[Trajectories], steps: int) -> Recipe:
    """Return a solver fitted to some starts, then polished on others that are drawn for where it goes wrong."""
    recipe, _ = tune(first, steps, WALKS, ROUNDS)
    for _ in range(STAGES):
        recipe, _ = polish([pool.draw(MORE, recipe) for pool in pools], recipe, ROUNDS)
    return recipe


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
        seeds = range(FIRST_SEED, FIRST_SEED + MIXTURES)
        pools = [make_pool(d, seeds, STARTS, schedule, "recipes") for d in DIMENSIONS[size]]
        first = [pool.draw(FIRST, fine=FINE) for pool in pools]
        seeds = range(TEST_SEED, TEST_SEED + TEST_MIXTURES)
        test = [make_pool(d, seeds, TEST_STARTS, schedule, "recipes").everything for d in DIMENSIONS[size]]
        for steps in map(int, options.steps.split(",")):
            table = json.loads(options.out.read_text()) if options.out.exists() else {}
            rows = table.setdefault(name, {}).setdefault(size, {})
            candidates = {"fitted": fit(pools, first, steps)}
            candidates |= {f"published {i}": recipe for i, recipe in enumerate(published(first, steps))}
            if str(steps) in rows:
                candidates["kept"] = of_row(rows[str(steps)])
            errors = {word: found[1] for word, recipe in candidates.items() if (found := attempt(test, recipe))}
            best = min(errors, key=lambda word: errors[word])
            rows[str(steps)] = rounded(candidates[best])
            options.out.write_text(json.dumps(table, separators=(",", ":")) + "\n")
            others = {word: round(value, 2) for word, value in errors.items() if not word.startswith("published")}
            least = min((value for word, value in errors.items() if word.startswith("published")), default=0.0)
            print(f"{name} {size} {steps}: {best} of {others}, published {least:.2f}, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
