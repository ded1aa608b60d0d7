r"""MNIST, the same minutes for everyone: reverie beside diffusers' loop and denoising-diffusion-pytorch.

    python benchmarks/mnist.py --data FOLDER --minutes 10 --json mnist.json --save pictures

trains each on the 60,000 training images at their full 28x28, draws 5,000 samples from each, and prints images/s in
training (the median step after the warm-up), parameters, seconds for each sample, and the Frechet distance of the
samples to the 10,000 test images in the features of a small classifier, which is trained here, on the training images
and their labels. The floor is the distance of 5,000 real training images.

What is equal: the data, the threads, the minutes of training (wall time from the first batch), the network
evaluations for each sample (50 steps of DDIM, eta 0), the number of samples, and the classifier. What is each one's
own: everything else, batch size and learning rate included, of which peers.py tells; options give the peers other
values. The networks of ours and of diffusers are one architecture (channels 32, 64, 64; attention at the second
level; 1.62 M parameters), unconditional, without padding or resizing; the classes are used by the classifier alone.
Each trainer runs in a process of its own, one after the other in the order of --only, so that no memory and no
threads are left over; the load before each is in the JSON, for figures taken on a busy machine are none.

The distance of 5,000 samples is too large for everyone, by the bias that is printed with it. Its error is that of the
samples, not that of another seed's training.

References:
    THE MNIST DATABASE of handwritten digits (LeCun, Cortes & Burges)
    http://yann.lecun.com/exdb/mnist/
"""

import argparse
import gzip
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from peers import Outcome, Task, count_parameters, images_per_second, last_tenth, train_ddpm_pytorch, train_diffusers
from report import machine, save_grid, table, versions
from torch import Tensor

from reverie.base.errors import DataError, ReverieError, UsageError
from reverie.base.randomness import generator
from reverie.evaluation.features import SmallClassifier, train_classifier
from reverie.evaluation.frechet import Measured, frechet_with_error

Images = UInt8[Tensor, "n 1 28 28"]
Trainer = Callable[[Task, Images], Outcome]

PACKAGES = ("reverie", "torch", "numpy", "diffusers", "accelerate", "denoising-diffusion-pytorch", "ema-pytorch")
LEAST_ACCURACY = 0.985


# Ours -----------------------------------------------------------------------------------------


def train_ours(task: Task, images: Images) -> Outcome:
    """Train by reverie, with its own defaults for everything that the task does not say."""
    import reverie as rv

    told = {"batch_size": task.batch_size, "learning_rate": task.learning_rate, "warmup": task.warmup}
    settings: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    # All the images, and no saving or sampling while the clock runs, as with the others; each step is timed.
    quiet = {"held_out": 0, "validate_every": 0, "sample_every": 0, "save_every": sys.maxsize, "log_every": 1}
    source = str(Path(task.data) / "train-images-idx3-ubyte.gz")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        rv.train(data=source, out=str(run), minutes=task.minutes, seed=task.seed, labels=False, **quiet, **settings)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        model = rv.load(run)
    steps = [line for line in lines if "seconds" in line]
    batch = steps[-1]["images"] // steps[-1]["step"]
    began = time.perf_counter()
    samples = rv.sample(
        model, task.samples, sampler="ddim", steps=task.sample_steps, seed=task.seed, batch_size=task.sample_batch
    )
    chosen = {
        "batch_size": batch,
        "learning_rate": max(line["learning_rate"] for line in steps),
        "prediction": model.card.prediction,
        "schedule": model.card.schedule.name,
        "sampler": f"ddim, {task.sample_steps} steps",
    }
    return Outcome(
        settings | chosen,
        model.parameters,
        steps[-1]["step"],
        steps[-1]["seconds"],
        images_per_second([line["seconds"] for line in steps], batch),
        last_tenth([line["loss"] for line in steps]),
        (time.perf_counter() - began) / task.samples,
        samples.uint8,
    )


TRAINERS: dict[str, Trainer] = {"ours": train_ours, "diffusers": train_diffusers, "ddpm-pytorch": train_ddpm_pytorch}


# Data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 28, 28) with their labels (N,)."""

    images: Images
    labels: UInt8[Tensor, " n"]


def load_split(folder: Path, name: str) -> Split:
    """Return one split of MNIST: "train" or "t10k"."""
    images, labels = (
        read_idx(folder / f"{name}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{name}-labels-idx1-ubyte.gz"),
    )
    return Split(images[:, None], labels)


def read_idx(path: Path) -> Tensor:
    """Return the bytes of a gzipped IDX file: two zeros, type 8 (uint8), the number of axes, their lengths, the data.

    Raises:
        DataError: The file is missing or is not one.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not readable ({why}); pass the folder of MNIST's four .gz files as --data") from None
    start = 4 + 4 * raw[3] if len(raw) > 3 else len(raw)
    shape = np.frombuffer(raw[4:start], ">i4").tolist()
    if raw[:3] != b"\0\0\x08" or len(raw) - start != np.prod(shape):
        raise DataError(f"{path}: not an IDX file of bytes; download it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


# The judge --------------------------------------------------------------------------------------


class Judge:
    """The Frechet distance to the test images, in the features of a classifier trained on the training images.

    Arguments:
        train: The training images.
        test: The test images, which the classifier has not seen.
        cache: File of the classifier's weights: read where it is there, else written; None for no file.

    Raises:
        UsageError: The cache holds a classifier of other data, or the classifier is not good enough to judge.
    """

    def __init__(self, train: Split, test: Split, cache: Path | None) -> None:
        self.train = train
        self.about = {"data": f"{len(train.images)} images, crc32 {zlib.crc32(train.images.numpy().tobytes()):08x}"}
        began = time.perf_counter()
        self.cached = cache is not None and cache.exists()
        self.classifier = (
            self.read(cache) if cache and self.cached else train_classifier(*self.pair(), about=self.about)
        )
        self.seconds = time.perf_counter() - began
        self.accuracy = self.classifier.accuracy(test.images, test.labels)
        if self.accuracy <= LEAST_ACCURACY:
            raise UsageError(f"the classifier recognises {self.accuracy:.2%} of the test images; too few to judge by")
        if cache and not self.cached:
            self.classifier.save(cache)
        self.real = self.classifier.features(test.images)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return what the classifier is trained on."""
        return self.train.images, self.train.labels

    def read(self, cache: Path) -> SmallClassifier:
        """Return the classifier of an earlier run, if it is one of this data."""
        classifier = SmallClassifier.load(cache)
        if classifier.about.get("data") != self.about["data"]:
            raise UsageError(
                f"{cache} is a classifier of other data ({classifier.about.get('data')}); pass another --cache"
            )
        return classifier

    def __call__(self, images: Images) -> Measured:
        """Return the distance of images to the test images."""
        return frechet_with_error(self.classifier.features(images), self.real)

    def floor(self, count: int) -> Measured:
        """Return the distance of so many real training images, drawn at random."""
        rows = generator(0, "floor").permutation(len(self.train.images))[:count]
        return self(self.train.images[torch.from_numpy(rows)])

    def report(self) -> dict[str, Any]:
        """Return what the classifier is."""
        return {
            "test_accuracy": self.accuracy,
            "parameters": count_parameters(self.classifier),
            "seconds": round(self.seconds, 1),
            "cached": self.cached,
            **self.classifier.about,
        }


# One trainer, in its own process ----------------------------------------------------------------


def run_trainer(task: Task, threads: int, folder: Path) -> dict[str, Any]:
    """Run a trainer in a new process; its outcome and its samples are then in the folder.

    Raises:
        ReverieError: It failed; the message is its last line.
    """
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(asdict(task)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--run-task", str(folder), "--threads", str(threads)]
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = ((folder / "log.txt").read_text().strip().splitlines() or ["no output"])[-1]
        raise ReverieError(f"{task.trainer} failed with code {code}: {last}")
    return json.loads((folder / "outcome.json").read_text())


def run_task(folder: Path, threads: int) -> None:
    """Do the task in a folder, in this process."""
    torch.set_num_threads(threads)
    task = Task(**json.loads((folder / "task.json").read_text()))
    load = os.getloadavg()[0]
    done = TRAINERS[task.trainer](task, load_split(Path(task.data), "train").images)
    np.save(folder / "samples.npy", done.samples.numpy())
    outcome = {name: value for name, value in vars(done).items() if name != "samples"}
    outcome |= {
        "images": done.steps * done.settings["batch_size"],
        "samples": len(done.samples),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_before": load,
    }
    (folder / "outcome.json").write_text(json.dumps(outcome))


# The command ------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of MNIST's four IDX files, gzipped (required)")
    add("--minutes", type=float, default=10.0, help="minutes of training for each (default: 10)")
    add("--only", default=",".join(TRAINERS), help="trainers, in this order (default: %(default)s)")
    add("--threads", type=int, default=cores, help="threads for each (default: all cores, %(default)s here)")
    add("--samples", type=int, default=5000, help="samples of each (default: %(default)s)")
    add("--sample-steps", type=int, default=50, help="network evaluations for a sample (default: %(default)s)")
    add("--sample-batch", type=int, default=250, help="samples drawn at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of training and sampling (default: 0)")
    add("--batch-size", type=int, help="images in a step of ours (default: reverie's)")
    add("--peer-batch-size", type=int, help="images in a step of the peers (default: theirs, 16)")
    add("--peer-learning-rate", type=float, help="learning rate of the peers (default: theirs, 1e-4)")
    add(
        "--peer-warmup",
        type=int,
        help="warm-up steps of diffusers, a tenth of the minutes at most (default: its own, 500)",
    )
    add("--peer-precision", choices=("no", "bf16"), help="mixed precision of the peers (default: theirs, no)")
    add("--cache", type=Path, help="file of the classifier's weights, to train it once")
    add("--json", type=Path, help="write one object with everything to this file")
    add("--save", type=Path, help="write a grid of each one's samples into this folder")
    add("--run-task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run_task:
        return options
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in TRAINERS]:
        parser.error(f"--only: there is no trainer {unknown[0]!r} (known: {', '.join(TRAINERS)})")
    if options.data is None:
        parser.error("--data: name the folder of MNIST's four IDX files")
    if options.minutes <= 0 or min(options.threads, options.sample_steps, options.sample_batch) < 1:
        parser.error("--minutes, --threads, --sample-steps and --sample-batch must be above 0")
    if not 100 <= options.samples <= 10_000:
        parser.error("--samples must lie in 100..10000: below there is no distance to speak of")
    for path in (options.json, options.cache):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}; make it first")
    if options.peer_batch_size is not None and options.peer_batch_size < 16:
        parser.error("--peer-batch-size must be at least 16: denoising-diffusion-pytorch refuses less")
    if options.peer_warmup is not None and "ddpm-pytorch" in options.only:
        parser.error("--peer-warmup: denoising-diffusion-pytorch has none; add --only ours,diffusers")
    return options


def make_task(name: str, options: argparse.Namespace) -> Task:
    """Return what a trainer is asked for."""
    shared = {
        "trainer": name,
        "data": str(options.data),
        "minutes": options.minutes,
        "samples": options.samples,
        "sample_steps": options.sample_steps,
        "sample_batch": options.sample_batch,
        "seed": options.seed,
    }
    if name == "ours":
        return Task(**shared, batch_size=options.batch_size)
    return Task(
        **shared,
        batch_size=options.peer_batch_size,
        learning_rate=options.peer_learning_rate,
        warmup=options.peer_warmup,
        precision=options.peer_precision,
    )


def distance(measured: Measured) -> dict[str, float]:
    """Return a distance as JSON holds it."""
    return {"frechet": measured.value, "standard_error": measured.standard_error, "bias": measured.bias}


def show(result: dict[str, Any]) -> str:
    """Return the printed table."""
    head = ["", "parameters", "images/s", "steps x batch", "s/sample", "Frechet", "+-", "bias"]
    rows = []
    for name, got in result["trainers"].items():
        if "error" not in got:
            work = [f"{got['parameters']:,}", f"{got['images_per_second']:.1f}"]
            work += [f"{got['steps']} x {got['settings']['batch_size']}", f"{got['sample_seconds']:.4f}"]
            rows.append([name, *work, *numbers(got)])
    rows.append(["real images", "", "", "", "", *numbers(result["floor"])])
    return table(head, rows)


def numbers(got: dict[str, Any]) -> list[str]:
    """Return a distance as the table shows it."""
    return [f"{got['frechet']:.2f}", f"{got['standard_error']:.2f}", f"{got['bias']:.2f}"]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    options = parse(arguments)
    if options.run_task:
        run_task(options.run_task, options.threads)
        return 0
    torch.set_num_threads(options.threads)
    try:
        judge = Judge(load_split(options.data, "train"), load_split(options.data, "t10k"), options.cache)
    except ReverieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"classifier: {judge.accuracy:.2%} of the test images, {judge.seconds:.0f} s", flush=True)

    result: dict[str, Any] = {
        "benchmark": "mnist",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(),
        "versions": {"python": sys.version.split()[0]} | versions(PACKAGES),
        "threads": options.threads,
        "minutes": options.minutes,
        "network_evaluations_per_sample": options.sample_steps,
        "classifier": judge.report(),
        "floor": distance(judge.floor(options.samples)),
        "trainers": {},
    }
    for name in options.only:
        result["trainers"][name] = measure(make_task(name, options), options, judge)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")  # after each, so that none is lost
    print(show(result))
    return int(any("error" in got for got in result["trainers"].values()))


def measure(task: Task, options: argparse.Namespace, judge: Judge) -> dict[str, Any]:
    """Return what one trainer reached, or why it failed."""
    print(f"{task.trainer}: {task.minutes:g} minutes of training, then {task.samples} samples", flush=True)
    with tempfile.TemporaryDirectory(prefix="reverie-mnist-") as folder:
        place = Path(folder) / task.trainer
        try:
            got = run_trainer(task, options.threads, place)
        except ReverieError as error:
            print(f"error: {error}", file=sys.stderr)
            return {"error": str(error)}
        samples = torch.from_numpy(np.load(place / "samples.npy"))
    if options.save:
        save_grid(samples[:100], options.save / f"{task.trainer}.png")
    return got | distance(judge(samples))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
