r"""Bits/dim of held-out images: by the probability-flow ODE, with its error, beside the variational bound.

    python benchmarks/likelihood.py --model runs/digits --data digits -n 100 --json likelihood.json

prints, for the same images, each with its standard error over them:

    uniform   the ODE after uniform dequantisation: an upper bound on -log2 P of the bytes
    learned   the same after a dequantisation that is learned here first, on images that are not among these
    noised    the ODE from data noised as at the model's first time: an upper bound too
    as-is     the ODE's density at the images themselves, in units of one per level: bounds nothing, and flatters
    bound     the variational bound, DDPM's, of a model on a table: an upper bound

The images are those that the run held out where --data is what it was trained on, and else any of --data. A model
with classes is taken as it is without one, where it has learned that.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from report import machine, table, versions
from torch import Tensor

import reverie as rv
from reverie.base.errors import ReverieError
from reverie.base.randomness import Noise
from reverie.data.batches import run_split, split
from reverie.data.dataset import Dataset
from reverie.diffusion.dequantisation import Logistic, train_dequantiser
from reverie.diffusion.flow_likelihood import Likelihood, discrete_log_likelihood, log_likelihood
from reverie.diffusion.likelihood import bound
from reverie.training.config import TrainConfig


@dataclass(frozen=True)
class Images:
    """Bytes (N, C, H, W) and the condition that goes with them.

    Arguments:
        bytes: The images.
        label: The label of each (N,), or None for a model without classes.
    """

    bytes: UInt8[Tensor, "n c h w"]
    label: Tensor | None

    def condition(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Return the condition of some of the images."""
        return {} if self.label is None else {"label": self.label[rows]}


def choose(dataset: Dataset, model: rv.Model, n: int) -> tuple[list[int], list[int], bool]:
    """Return the indices to measure, others to train a dequantiser on, and whether the model has not seen the first."""
    everything = list(range(len(dataset)))
    record, data = model.card.training, model.card.data
    if record is None or data is None or data.fingerprint != dataset.fingerprint:
        train, test = split(len(dataset), min(n, len(dataset) // 2), 0)
        return test, train, False
    train, test = run_split(len(dataset), TrainConfig(**record.config).held_out, record.seed)
    return (test[:n], train, True) if test else (everything[:n], everything[n:], False)


def load_images(dataset: Dataset, indices: Sequence[int], model: rv.Model) -> Images:
    """Return some images, with no class where the model knows that, and else with their own."""
    if not model.card.classes:
        return Images(dataset.images(indices), None)
    if model.card.unconditional:
        return Images(dataset.images(indices), torch.full((len(indices),), model.card.null_label))
    return Images(dataset.images(indices), dataset.labels(indices))


# Estimates --------------------------------------------------------------------------------------

Estimate = Callable[[Tensor, dict[str, Tensor], Noise], Likelihood]  # of bytes, their condition and their seeds
NAMES = ("uniform", "learned", "noised", "as-is", "bound")


def make_estimate(name: str, model: rv.Model, options: argparse.Namespace, others: Images) -> Estimate:
    """Return an estimate by the ODE."""
    denoiser = model.denoiser
    how = {"trace": options.trace, "rtol": options.tolerance, "atol": options.tolerance}
    if options.trace == "hutchinson":
        how["probes"] = options.probes
    if name in ("noised", "as-is"):
        start: dict[str, Any] = {"start": "noised", "levels": 256} if name == "noised" else {}
        return lambda images, condition, noise: log_likelihood(
            denoiser, images / 127.5 - 1, condition, noise=noise, **start, **how
        )
    learned = None
    if name == "learned":
        learned = Logistic(model.card.shape[0])
        train_dequantiser(learned, denoiser, others.bytes, options.learning_steps, others.condition())
    return lambda images, condition, noise: discrete_log_likelihood(
        denoiser, images, condition, dequantiser=learned, draws=options.draws, noise=noise, **how
    )


def measure(name: str, model: rv.Model, images: Images, others: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Return an estimate's figures."""
    if name == "bound":
        return measure_bound(model, images, options)
    began = time.perf_counter()
    estimate, parts = make_estimate(name, model, options, others), []
    for start in range(0, len(images.bytes), options.batch_size):
        rows = slice(start, start + options.batch_size)
        batch = images.bytes[rows]
        parts.append(estimate(batch, images.condition(rows), Noise(range(start, start + len(batch)))))
    whole = Likelihood.join(parts)
    # A density on [-1, 1] in units of one per level: ln 127.5 less for each dimension.
    bits = whole.bits_per_dim + (0 if whole.bound else math.log2(127.5))
    unit = whole.dimensions * math.log(2)
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": whole.sampling_error / unit,
        "own_error": None if math.isnan(whole.own_error) else whole.own_error / unit,
        "bound": whole.bound,
        "evaluations": float(whole.evaluations.double().mean()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure_bound(model: rv.Model, images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Return the variational bound's figures."""
    began = time.perf_counter()
    variance = "learned" if model.card.learned_variance else options.variance
    parts = []
    for start in range(0, len(images.bytes), options.batch_size):
        rows = slice(start, start + options.batch_size)
        x0 = images.bytes[rows] / 127.5 - 1
        noise = Noise(range(start, start + len(x0)))
        parts.append(bound(model.denoiser, x0, noise, images.condition(rows), variance).total.double())
    total = torch.cat(parts)
    return {
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(len(total))),
        "own_error": None,
        "bound": True,
        "variance": variance,
        "evaluations": float(model.denoiser.schedule.timesteps),
        "seconds": round(time.perf_counter() - began, 1),
    }


# The command ------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a run, or whatever else rv.load takes")
    add("--data", required=True, help="digits, a folder, or another source of images")
    add("-n", type=int, default=64, help="how many images (default: %(default)s)")
    add("--trace", choices=("hutchinson", "exact"), default="hutchinson", help="(default: %(default)s)")
    add("--probes", type=int, default=2, help="probes of each image, for hutchinson (default: %(default)s)")
    add("--draws", type=int, default=1, help="places drawn for each image (default: %(default)s)")
    add(
        "--only",
        default="uniform,noised,as-is,bound",
        help="which of uniform, learned, noised, as-is, bound (default: %(default)s)",
    )
    add("--learning-steps", type=int, default=300, help="of the learned dequantisation (default: %(default)s)")
    add("--variance", choices=("small", "large"), default="large", help="of the bound's steps (default: %(default)s)")
    add("--tolerance", type=float, default=1e-3, help="rtol and atol of the ODE (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    add("--json", type=Path, help="write one object with everything to this file")
    options = parser.parse_args(arguments)
    if min(options.n, options.probes, options.draws, options.batch_size, options.learning_steps) < 1:
        parser.error("-n, --probes, --draws, --batch-size and --learning-steps must be above 0")
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in NAMES]:
        parser.error(f"--only: there is no estimate {unknown[0]!r} (known: {', '.join(NAMES)})")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"{options.json}: there is no folder {options.json.parent}; make it first")
    return options


def show(found: dict[str, dict[str, Any]]) -> str:
    """Return the printed table."""
    rows = []
    for name, got in found.items():
        own = "" if got["own_error"] is None else f"{got['own_error']:.4f}"
        figures = [f"{got['bits_per_dim']:.4f}", f"{got['standard_error']:.4f}", own]
        rows.append([name, *figures, f"{got['evaluations']:.0f}", f"{got['seconds']:.1f}"])
    return table(["", "bits/dim", "+-", "own error", "evaluations", "seconds"], rows)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    options = parse(arguments)
    try:
        model = rv.load(options.model)
        channels, *size = model.card.shape
        dataset = rv.open_dataset(options.data, size=(size[0], size[1]), channels=channels)
        chosen, others, unseen = choose(dataset, model, options.n)
        images, rest = (load_images(dataset, indices, model) for indices in (chosen, others))
        print(f"{len(chosen)} images{', held out' if unseen else ''}; {model!r}", flush=True)
        found = {name: measure(name, model, images, rest, options) for name in options.only}
    except ReverieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(show(found))
    if options.json:
        result = {
            "benchmark": "likelihood",
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "machine": machine(),
            "versions": {"python": sys.version.split()[0]} | versions(("reverie", "torch", "numpy")),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "model": {"source": options.model, "sha256": model.digest, "parameters": model.parameters},
            "data": {"name": options.data, "fingerprint": dataset.fingerprint, "n": len(chosen), "held_out": unseen},
            "settings": {name: getattr(options, name) for name in ("trace", "probes", "draws", "tolerance")},
            "estimates": found,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
