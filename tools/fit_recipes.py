"""Fit the solvers that `--sampler auto` uses where a model has none of its own, and write them into the package.

    python tools/fit_recipes.py --schedules linear,cosine

They are fitted, by reverie.diffusion.tuning, to mixtures of Gaussians that are drawn by seeds which nothing else uses;
no network is among them. There are two for each schedule and number of steps: small, for samples of fewer than 2048
numbers, fitted in 2 to 64 dimensions, and large, fitted in 2 to 3072. What is named is fitted anew, the rest is kept.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch

from reverie.base.randomness import normal
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.recipes import FILE
from reverie.diffusion.registry import schedules
from reverie.diffusion.tuning import Trajectories, trajectories, tune

STEPS = (*range(1, 17), 18, 20)  # with more steps UniPC on the grid uniform in log-SNR is as good, or better
POOLS = {  # by dimension: mixtures, and starts of each
    "small": {2: (4, 64), 8: (3, 48), 16: (3, 48), 64: (4, 48)},
    "large": {2: (3, 64), 8: (3, 48), 16: (3, 48), 64: (3, 48), 768: (3, 24), 3072: (2, 16)},
}
FIRST_SEED = 1_000_000


def pool(name: str, size: str) -> list[Trajectories]:
    """Return exact trajectories of all mixtures of a size on a schedule."""
    schedule = schedules[name]()
    found = []
    for dimension, (mixtures, starts) in POOLS[size].items():
        for i in range(mixtures):
            mixture = random_mixture(dimension, FIRST_SEED + i, schedule)
            scale = schedule.prior_std(torch.ones(1, dtype=torch.float64))
            found.append(trajectories(mixture, scale * normal((starts, dimension), FIRST_SEED, "recipes", i).double()))
    return found


def main() -> None:
    """Fit, and write after each schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--schedules", default="linear,scaled-linear,cosine,vp,flow,edm", help="names, with commas")
    parser.add_argument("--sizes", default="small,large", help="with commas")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of recipes")
    parser.add_argument("--walks", type=int, default=60, help="candidate grids for each number of steps")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, size in product(options.schedules.split(","), options.sizes.split(",")):
        began, sets, rows = time.perf_counter(), pool(name, size), {}
        for steps in STEPS:
            recipe, found = tune(sets, steps, options.walks)
            rows[str(steps)] = {
                "lam": [round(value, 6) for value in recipe.lam],
                "weights": [[round(value, 6) for value in row] for row in recipe.weights],
            }
            print(f"{name} {size} {steps}: {found.loss:.2f} after {time.perf_counter() - began:.0f} s", flush=True)
        table = json.loads(options.out.read_text()) if options.out.exists() else {}
        table.setdefault(name, {})[size] = rows
        options.out.write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
