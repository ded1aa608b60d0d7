r"""MNIST, from diffusion in 35 evaluations to one: the families for equal minutes, then models of one and two steps.

    python benchmarks/mnist_few_steps.py --data FOLDER --minutes 44 --keep runs --json found.json --save pictures

trains, one after the other and all within the minutes,

    ddpm, edm, edm2, flow                               for 3 minutes each, from scratch,
    consistency distillation, easy consistency tuning   for 4 minutes each, both from edm,
    MeanFlow                                            for 24 minutes, from flow,

and prints the Frechet distance of 5,000 samples to the 10,000 test images in the features of the classifier of
benchmarks/mnist.py: of the families at 35 evaluations, by DPM-Solver++(2M) in 35 steps on each one's own grid; of the
others at one evaluation and at two, with their ratio to the family that they began as, and how many images a second
one evaluation makes.

All are unconditional and see all 60,000 training images, without augmentation. ddpm, edm and flow have one U-Net; edm2
is the paper's network of the same widths, which makes fewer steps in its share. The student's teacher is the average
that is sampled. Minutes are those of one core, as the process's own clock counts them, so that a machine that is busy
with something else gives the same figures; the start of each training and the trial steps by which their number is set
are in them. With --keep a training that is done is not made again, so that the whole may be done in parts.

References:
    THE MNIST DATABASE of handwritten digits (LeCun, Cortes & Burges)
    http://yann.lecun.com/exdb/mnist/
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mnist import Judge, load_split
from report import machine, save_grid, table, versions

import reverie as rv
from reverie.models.model import Model

PACKAGES = ("reverie", "torch", "numpy")
TRIAL = (4, 24)  # steps of two trials, whose difference says what a step takes
MANY: dict[str, dict[str, Any]] = {"35": {"sampler": "dpmpp-2m", "steps": 35}}


@dataclass(frozen=True)
class Training:
    """One training: its share of the minutes, what `rv.train` is told, what it begins as, and how it is sampled."""

    shares: float
    settings: dict[str, Any]
    teacher: str | None = None
    ways: dict[str, dict[str, Any]] = field(default_factory=lambda: MANY)


SHOWN = 20  # samples of each in the picture of all
SHARED: dict[str, Any] = {
    "labels": False, "held_out": 0, "sample_every": 0, "save_every": sys.maxsize, "log_every": 1,
    "dtype": "bfloat16", "batch_size": 32, "threads": 1,
}  # fmt: skip
SCRATCH: dict[str, Any] = {"validate_every": 0, "ema_lengths": (0.1, 0.05)}
SIZE: dict[str, Any] = {"widths": (16, 32, 64), "layers": 1, "attention": (False, False, True)}
UNET: dict[str, Any] = SCRATCH | SIZE | {"decay": "cosine", "learning_rate": 2e-3}
# Noise levels above those of photographs: the root mean square of MNIST is twice theirs, most of it in one colour.
STUDENT: dict[str, Any] = {
    "ema_lengths": (0.05, 0.1), "decay": "cosine", "learning_rate": 1e-3, "times": "log-normal", "time_mean": 0.0,
    "time_std": 1.8,
}  # fmt: skip
LATER: dict[str, Any] = STUDENT | {"time_mean": 0.6, "time_std": 1.6}  # more of the spans that begin at noise


def few(middle: float) -> dict[str, dict[str, Any]]:
    """Return how a consistency model is sampled at one evaluation, and at two: by way of a noise level."""
    one = {"sampler": "consistency", "steps": 1}
    return {"1": one, "2": {"sampler": "consistency", "grid": (1.0, middle / 80)}}


TRAININGS = {
    "ddpm": Training(3, UNET | {"schedule": "linear", "prediction": "eps"}),
    "edm": Training(3, UNET | {"schedule": "edm", "prediction": "edm", "times": "log-normal"}),
    # A few pictures are held out for `reverie ema --sweep`.
    "edm2": Training(3, SCRATCH | SIZE | {"network": "edm2", "learning_rate": 0.02, "held_out": 0.002}),
    "flow": Training(3, UNET | {"schedule": "flow", "prediction": "velocity"}),
    "distilled": Training(4, STUDENT | {"objective": "consistency"}, "edm", few(1.3)),
    "tuned": Training(4, STUDENT | {"objective": "easy-consistency", "stages": 5}, "edm", few(0.8)),
    "mean-flow": Training(24, LATER | {"objective": "mean-flow"}, "flow", {"1": {"steps": 1}, "2": {"steps": 2}}),
}


@dataclass(frozen=True)
class Trained:
    """A run that is done: where, how many steps of how many images, and the seconds, those of the trial included."""

    run: Path
    steps: int
    images: int
    seconds: float


# Training ---------------------------------------------------------------------------------------


def settings_of(name: str, source: Path, runs: Path) -> dict[str, Any]:
    """Return what `rv.train` is told for a training, but for its length and its folder."""
    training = TRAININGS[name]
    began_as = {"teacher": str(runs / training.teacher)} if training.teacher else {}
    return {"data": str(source), **SHARED, **training.settings, **began_as}


def train(name: str, minutes: float, source: Path, runs: Path) -> Trained:
    """Train for so many minutes of a core: a few steps to see what one takes, then as many as fit; or find it done."""
    run, about = runs / name, runs / f"{name}.json"
    if about.exists():
        return Trained(run, **json.loads(about.read_text()))
    settings, clock = settings_of(name, source, runs), [time.process_time()]
    with tempfile.TemporaryDirectory() as folder:
        for steps in TRIAL:
            rv.train(out=f"{folder}/{steps}", steps=steps, **settings)
            clock.append(time.process_time())
    begin, middle, end = clock
    first, second = middle - begin, end - middle
    step = (second - first) / (TRIAL[1] - TRIAL[0])
    left = 60 * minutes - first - second - (first - TRIAL[0] * step)  # the last is what a start takes
    steps = max(1, int(left / step))
    rv.train(out=str(run), steps=steps, **settings)
    done = {"steps": steps, "images": logged(run)[-1]["images"], "seconds": time.process_time() - begin}
    about.write_text(json.dumps(done))
    return Trained(run, **done)


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log that tell of steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "seconds" in line]


# Measuring --------------------------------------------------------------------------------------


def draw(model: Model, count: int, way: dict[str, Any], seed: int) -> tuple[torch.Tensor, float]:
    """Return samples (count, 1, 28, 28) as bytes, and how many were made a second."""
    began = time.process_time()
    made = model.sample(count, seed=seed, batch_size=100, **way)
    return made.uint8, count / (time.process_time() - began)


def measure(name: str, trained: Trained, judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a training reached: the distance by each way of sampling, and the speed."""
    model, found = rv.load(trained.run, speed="fast"), {}
    for way, how in TRAININGS[name].ways.items():
        images, speed = draw(model, options.samples, how, options.seed)
        got = judge(images)
        found[way] = {
            "frechet": got.value, "standard_error": got.standard_error, "bias": got.bias, "images_per_second": speed
        }  # fmt: skip
        print(f"{name}, {way}: {got.value:.2f} +- {got.standard_error:.2f}, {speed:.1f} images/s", flush=True)
        if options.save:
            save_grid(images[:100], options.save / f"{name}-{way}.png")
            options.rows.append(images[:SHOWN])
    record = {"parameters": model.parameters, "teacher": TRAININGS[name].teacher, "ways": found}
    work = {"steps": trained.steps, "images": trained.images, "seconds": trained.seconds}
    return record | work | {"settings": {**SHARED, **TRAININGS[name].settings}}


# The command ------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of MNIST's four IDX files, gzipped")
    add(
        "--minutes",
        type=float,
        default=44.0,
        help="minutes of a core for all trainings (default: 44)",
    )
    add("--only", default=",".join(TRAININGS), help="trainings, in this order (default: %(default)s)")
    add("--samples", type=int, default=5000, help="samples of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="the first sample's seed (default: 0)")
    add("--keep", type=Path, help="folder of the runs; those that are done are not made again")
    add("--cache", type=Path, help="file of the classifier's weights, to train it once")
    add("--json", type=Path, help="write one object with everything to this file")
    add("--save", type=Path, help="write a grid of each one's samples into this folder")
    options = parser.parse_args(arguments)
    options.only, options.rows = options.only.split(","), []
    if unknown := [name for name in options.only if name not in TRAININGS]:
        parser.error(f"--only: there is no training {unknown[0]!r} (known: {', '.join(TRAININGS)})")
    return options


def show(result: dict[str, Any]) -> str:
    """Return the printed tables."""
    found, rows, few = result["trainings"], [], []
    for name, got in found.items():
        work = [f"{got['parameters']:,}", f"{got['seconds'] / 60:.1f}", f"{got['images']:,}"]
        distances = {way: f"{one['frechet']:.2f} +- {one['standard_error']:.2f}" for way, one in got["ways"].items()}
        if got["teacher"] is None:
            rows.append([name, *work, *(distances[way] for way in MANY)])
            continue
        base = found.get(got["teacher"])
        ratios = [ratio(got, way, base) for way in ("1", "2")]
        speed = f"{got['ways']['1']['images_per_second']:.0f}"
        few.append(
            [f"{name}, from {got['teacher']}", *work, distances["1"], ratios[0], distances["2"], ratios[1], speed]
        )
    head = ["", "parameters", "minutes", "images"]
    tables = [table([*head, *MANY], rows)] if rows else []
    if few:
        tables.append(table([*head, "1 evaluation", "x", "2 evaluations", "x", "images/s"], few))
    return "\n\n".join(tables)


def ratio(got: dict[str, Any], way: str, base: dict[str, Any] | None) -> str:
    """Return a distance over that of the family begun as, at its 35 evaluations."""
    if base is None:
        return ""
    return f"{got['ways'][way]['frechet'] / base['ways']['35']['frechet']:.2f}"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    options = parse(arguments)
    torch.set_num_threads(SHARED["threads"])
    judge = Judge(load_split(options.data, "train"), load_split(options.data, "t10k"), options.cache)
    share = options.minutes / sum(training.shares for training in TRAININGS.values())
    floor = judge.floor(options.samples)
    result: dict[str, Any] = {
        "benchmark": "mnist_few_steps",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(),
        "versions": {"python": sys.version.split()[0]} | versions(PACKAGES),
        "minutes": options.minutes,
        "classifier": judge.report(),
        "floor": {"frechet": floor.value, "standard_error": floor.standard_error},
        "trainings": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = options.keep or Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        source = options.data / "train-images-idx3-ubyte.gz"
        for name in options.only:
            trained = train(name, share * TRAININGS[name].shares, source, runs)
            result["trainings"][name] = measure(name, trained, judge, options)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")  # after each, so that none is lost
    if options.rows:
        save_grid(torch.cat(options.rows), options.save / "all.png", columns=SHOWN)
    print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
