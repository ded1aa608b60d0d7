r"""A trained model in few evaluations: how far from the 1000-step solution, and the Frechet distance, by sampler.

    python benchmarks/few_steps.py runs/mnist --data FOLDER --cache judge.safetensors --json few_steps.json

samples a model of MNIST's images, with as many evaluations as each column says, by published solvers on their usual
grids, by `auto` as it is for a model without a solver of its own, and by the solver that `tune` fits. The distance is
the root mean square, over samples and pixels in [-1, 1], to where DPM-Solver++(2M) ends in 1000 steps from the same
noise. The Frechet distance is that of benchmarks/mnist.py, its classifier and all, with the number of samples given:
it compares samplers with each other here, and is too large for all by the bias of so few.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mnist import Judge, load_split
from report import machine, table, versions
from torch import Tensor

import reverie as rv
from reverie.models.model import Model
from reverie.models.rewrite import with_solvers
from reverie.models.tuning import tune_model

WAYS: dict[str, dict[str, Any]] = {
    "ddim, trailing": {"sampler": "ddim", "grid": "trailing"},
    "dpmpp-2m, trailing": {"sampler": "dpmpp-2m", "grid": "trailing"},
    "dpmpp-2m, log-snr": {"sampler": "dpmpp-2m", "grid": "log-snr"},
    "unipc, trailing": {"sampler": "unipc", "grid": "trailing"},
    "unipc, log-snr": {"sampler": "unipc", "grid": "log-snr"},
    "auto": {"sampler": "auto"},
    "tuned": {"sampler": "auto"},
}
PACKAGES = ("reverie", "torch", "numpy")


def draw(model: Model, count: int, seed: int, steps: int, way: dict[str, Any]) -> Tensor:
    """Return samples (count, C, H, W) in [-1, 1]."""
    return model.sample(count, seed=seed, steps=steps, exact=False, batch_size=100, **way).images


def main() -> None:
    """Run, print two tables, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's four IDX files, gzipped")
    parser.add_argument("--evaluations", default="5,8,10,20", help="with commas")
    parser.add_argument("--samples", type=int, default=500, help="for the Frechet distance; 0 for none of it")
    parser.add_argument("--compared", type=int, default=16, help="samples whose distance is taken")
    parser.add_argument("--fit", type=int, default=24, help="trajectories that tune fits to")
    parser.add_argument("--walks", type=int, default=30)
    parser.add_argument("--cache", type=Path, help="file of the classifier's weights, to train it once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    steps = [int(word) for word in options.evaluations.split(",")]
    model, began = rv.load(options.model), time.perf_counter()
    bare = Model(model.denoiser, model.card)
    say = lambda words: print(f"{time.perf_counter() - began:.0f} s: {words}", file=sys.stderr)  # noqa: E731
    fitted = tune_model(bare, steps, samples=options.fit, walks=options.walks)
    fitting_seconds = time.perf_counter() - began
    own = Model(model.denoiser, with_solvers(model.card, fitted))
    say("fitted")
    truth = draw(bare, options.compared, 0, 1000, {"sampler": "dpmpp-2m", "grid": "trailing"})
    say("1000 steps")
    judge = Judge(load_split(options.data, "train"), load_split(options.data, "t10k"), options.cache)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in WAYS}
    for n in steps:
        for name, way in WAYS.items():
            used = own if name == "tuned" else bare
            images = draw(used, max(options.samples, options.compared), 0, n, way)
            off = (images[: options.compared] - truth).square().mean().sqrt().item()
            found[name][str(n)] = {"distance": off}
            if options.samples:
                as_bytes = (127.5 * images[: options.samples] + 127.5).round().clamp(0, 255).to(torch.uint8)
                found[name][str(n)]["frechet"] = judge(as_bytes).value
            say(f"{name}, {n}: {found[name][str(n)]}")
    for word in ("distance", "frechet") if options.samples else ("distance",):
        rows = [[name, *(f"{row[str(n)][word]:.4g}" for n in steps)] for name, row in found.items()]
        print(f"\n{word}\n\n{table(['sampler', *map(str, steps)], rows)}")
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        more = {"fitting_seconds": fitting_seconds, "samplers": found}
        options.json.write_text(json.dumps(about | more, indent=1) + "\n")


if __name__ == "__main__":
    main()
