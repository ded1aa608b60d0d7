r"""Training throughput: a step of ours beside diffusers' loop and denoising-diffusion-pytorch, turn by turn in one run.

    python benchmarks/training.py --json training.json

Each trainer is a process of its own with a whole training loop: data from memory, noise, the network forward and
backward, clipping, the optimiser, the average of the weights, and for ours the log. They wait for each other: one makes
a step while the others stand still, then the next, so that whatever else the machine does, it does to all of them
alike. The time of a step lies between two requests for a batch. Printed are medians, of wall time and of the process's
own CPU time, which a busy machine disturbs less; a trainer's ratio is the median of the ratios within the rounds.

What is equal: the images (the handwritten digits at the size asked for), the batch, the threads, the learning rate
where it is given, and for ours and diffusers the architecture (channels 32, 64, 64; attention at the second level,
heads of 8 channels; 1.62 M parameters). denoising-diffusion-pytorch's is its own (dim 32, multipliers 1, 2, 2; 1.41 M).
peers.py tells what of the peers' loops is theirs. `ours-plain` is ours with REVERIE_KERNELS=plain, `ours-compiled` with
torch.compile instead, both by PyTorch's operators. On a GPU, where there is one, all train there; `-bf16` after a
name is autocast.

--curves N makes N steps of each for each of some seeds and keeps the losses, of which it prints means and a test. With
--learning-rate, ours and diffusers then have the same first weights (diffusers'), noise schedule (linear), prediction
(eps), loss, optimiser (AdamW, betas 0.95 and 0.999, weight decay 1e-6) and warm-up; the third has its own. What is left
are the draws: order of the images, times, noise.

The test: the steps are cut into tenths. In each, the mean loss of a trainer less that of the reference, over the seeds,
is compared with its standard error, from the spread over the seeds, by Welch's t. Two trainers are equal within noise
where ten times the least of the p-values is 0.05 or more.
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TRAINERS = ("ours", "ours-plain", "diffusers", "ddpm-pytorch")
KNOWN = (*TRAINERS, "ours-compiled", "ours-bf16", "diffusers-bf16", "ddpm-pytorch-bf16")
PACKAGES = ("reverie", "torch", "diffusers", "accelerate", "denoising-diffusion-pytorch")


class Gate:
    """Where a trainer waits for its turn, before each step.

    Arguments:
        line: To the parent process, which is told how long a step took and says when the next may begin.
    """

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.began: tuple[float, float] | None = None

    def __call__(self) -> bool:
        """Report the step that has ended, wait, and return whether there is to be another."""
        settle()
        now = time.perf_counter(), time.process_time()
        took = None if self.began is None else (now[0] - self.began[0], now[1] - self.began[1])
        self.line.send(took)
        go = self.line.recv()
        self.began = time.perf_counter(), time.process_time()
        return go


def settle() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Over(Exception):  # noqa: N818 - no error
    """There are no more steps to make."""


def trainer(name: str, task: dict[str, Any], line: Connection) -> None:
    """Be one trainer, in a process of its own: steps while the parent lets it, then a report."""
    import torch

    torch.set_num_threads(task["threads"])
    kind = "ours" if name.startswith("ours") else name.removesuffix("-bf16")
    losses, parameters = (ours if kind == "ours" else peer)(name, kind, task, Gate(line))
    line.send({"losses": losses, "parameters": parameters, "peak_memory_mib": peak_memory()})


def peak_memory() -> int:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def ours(name: str, kind: str, task: dict[str, Any], gate: Gate) -> tuple[list[float], int]:
    """Train by reverie's own loop."""
    from reverie.training.config import TrainConfig
    from reverie.training.metrics import Console
    from reverie.training.trainer import Run
    from reverie.training.update import StepReport

    class Waiting(Run):
        """A run that waits for its turn before each step."""

        def step(self, batch: Any) -> StepReport:
            if not gate():
                raise Over
            report = super().step(batch)
            losses.append(report.loss)
            return report

    losses: list[float] = []
    equal: dict[str, Any] = {}
    if task["learning_rate"]:
        equal = {"schedule": "linear", "prediction": "eps", "warmup": task["warmup"], "weight_decay": 1e-6}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data="digits", size=task["size"], channels=1, labels=False, out=f"{folder}/run", steps=10**9,
            widths=(32, 64, 64), attention=(False, True, False), head_dim=8, layers=2, held_out=0, validate_every=0,
            sample_every=0, save_every=10**9, batch_size=task["batch"], learning_rate=task["learning_rate"],
            seed=task["seed"], dtype="bfloat16" if name.endswith("bf16") else "float32",
            compile=name == "ours-compiled", **equal,
        )  # fmt: skip
        with open(os.devnull, "w") as nowhere:
            run = Waiting(config, False, Console(nowhere))
            if equal:
                begin_as_diffusers(run, task)
            with suppress(Over):
                run.go()
    return losses, sum(p.numel() for p in run.network.parameters())


def begin_as_diffusers(run: Any, task: dict[str, Any]) -> None:
    """Give a run the weights that diffusers' loop begins with, its norms' groups, its optimiser's settings."""
    import peers
    import torch

    torch.manual_seed(task["seed"])
    theirs = peers.small_unet(task["size"])
    run.network.load_state_dict(theirs.state_dict())
    groups = {name: norm.num_groups for name, norm in theirs.named_modules() if isinstance(norm, torch.nn.GroupNorm)}
    for name, norm in run.network.named_modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.num_groups = groups[name]
    for ema in run.emas:
        ema.load(run.network.state_dict())
    for group in run.update.optimizer.param_groups:
        group["betas"] = (0.95, 0.999)


def peer(name: str, kind: str, task: dict[str, Any], gate: Gate) -> tuple[list[float], int]:
    """Train by a peer's loop, whose batches wait for their turn."""
    import peers

    import reverie as rv

    class Waiting(peers.TimedBatches):
        """Batches that are given out at their turn."""

        def __next__(self) -> Any:
            if not gate():
                raise StopIteration
            return super().__next__()

    found: dict[str, Any] = {}

    def outcome(task: Any, settings: Any, network: Any, batches: Any, losses: list[float], draw: Any) -> None:
        found.update(losses=losses, parameters=peers.count_parameters(network))

    peers.TimedBatches, peers.outcome = Waiting, outcome  # type: ignore[misc,assignment]
    data = rv.open_dataset("digits", size=task["size"], channels=1)
    told = peers.Task(
        kind, "", 1e6, 0, 1, 1, task["seed"], batch_size=task["batch"], learning_rate=task["learning_rate"],
        warmup=task["warmup"] if kind == "diffusers" and task["learning_rate"] else None,
        precision="bf16" if name.endswith("bf16") else "no",
    )  # fmt: skip
    train = peers.train_diffusers if kind == "diffusers" else peers.train_ddpm_pytorch
    train(told, data.images(range(len(data))))
    return found["losses"], found["parameters"]


# The parent ---------------------------------------------------------------------------------------


def start(name: str, task: dict[str, Any]) -> tuple[Any, Connection]:
    """Start a trainer, and wait until it stands at its first step."""
    here, there = mp.Pipe()
    count = str(task["threads"])
    told = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TQDM_DISABLE": "1"}
    told["REVERIE_KERNELS"] = "plain" if name in ("ours-plain", "ours-compiled") else "auto"
    before = dict(os.environ)
    os.environ.update(told)  # the child's, as it starts
    try:
        process = mp.get_context("spawn").Process(target=trainer, args=(name, task, there), daemon=True)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    there.close()
    here.recv()
    return process, here


def measure(names: Sequence[str], task: dict[str, Any], rounds: int, skip: int) -> dict[str, Any]:
    """Return what each trainer does, step by step in turn; the first rounds are not counted."""
    trainers = {name: start(name, task) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(skip + rounds):
        for name, (_, line) in trainers.items():
            line.send(True)
            took = line.recv()
            if turn >= skip:
                times[name].append(took)
        print(f"round {turn + 1} of {skip + rounds}", file=sys.stderr, flush=True)
    found = {}
    for name, (process, line) in trainers.items():
        line.send(False)
        found[name] = line.recv() | summary(times[name], task["batch"])
        process.join(30)
    return found


def summary(times: list[tuple[float, float]], batch: int) -> dict[str, Any]:
    """Return the medians."""
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "step_seconds": wall,
        "step_cpu_seconds": cpu,
        "images_per_second": batch / wall,
        "images_per_cpu_second": batch / cpu,
        "steps": times,
    }


def ratios(found: dict[str, Any], reference: str) -> dict[str, dict[str, float]]:
    """Return how many times as fast as another each trainer is: medians over the rounds."""
    base = found[reference]["steps"]
    return {
        name: {
            kind: statistics.median(b[i] / a[i] for a, b in zip(got["steps"], base, strict=True))
            for i, kind in enumerate(("wall", "cpu"))
        }
        for name, got in found.items()
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--only", default=",".join(TRAINERS), help=f"trainers, of {', '.join(KNOWN)} (default: %(default)s)")
    add("--size", type=int, default=32, help="height and width of the images (default: 32)")
    add("--batch-size", type=int, default=64, help="images in a step (default: 64)")
    add("--rounds", type=int, default=7, help="steps of each that are counted (default: 7)")
    add("--skip", type=int, default=2, help="steps of each before those (default: 2)")
    add("--curves", type=int, help="make so many steps of each instead and keep the losses, in tenths")
    add("--seeds", type=int, default=1, help="seeds of each for --curves (default: 1)")
    add("--learning-rate", type=float, help="one for all, with diffusers' schedule and prediction for ours")
    add("--warmup", type=int, default=50, help="with it: steps over which it rises, ours and diffusers (default: 50)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each (default: all cores)")
    add("--json", type=Path, help="write one object with everything to this file")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in KNOWN]:
        parser.error(f"--only: there is no trainer {unknown[0]!r} (known: {', '.join(KNOWN)})")
    if min(options.size, options.batch_size, options.rounds, options.threads, options.seeds) < 1 or options.skip < 0:
        parser.error("--size, --batch-size, --rounds and --threads must be above 0")
    if "ddpm-pytorch" in ",".join(options.only) and options.batch_size < 16:
        parser.error("--batch-size must be at least 16: denoising-diffusion-pytorch refuses less")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    options = parse(arguments)
    from report import gpu_or_not, machine, table, versions

    from reverie.kernels.dispatch import status

    task = {"size": options.size, "batch": options.batch_size, "threads": options.threads}
    task |= {"learning_rate": options.learning_rate, "warmup": options.warmup, "seed": 0}
    gpu_or_not()
    load = os.getloadavg()[0]
    rounds, skip = (options.curves, 0) if options.curves else (options.rounds, options.skip)
    found = measure(options.only, task, rounds, skip)
    curves = {name: [got["losses"]] for name, got in found.items()}
    for seed in range(1, options.seeds if options.curves else 1):
        for name, got in measure(options.only, task | {"seed": seed}, rounds, skip).items():
            curves[name].append(got["losses"])

    reference = next((name for name in options.only if name.startswith("diffusers")), options.only[0])
    compared = ratios(found, reference)
    head = ["", "images/s", "images/CPU-s", f"x {reference}", "x, CPU", "peak MiB", "parameters"]
    rows = [
        [
            name, f"{got['images_per_second']:.1f}", f"{got['images_per_cpu_second']:.1f}",
            f"{compared[name]['wall']:.2f}", f"{compared[name]['cpu']:.2f}", str(got["peak_memory_mib"]),
            f"{got['parameters']:,}",
        ]
        for name, got in found.items()
    ]  # fmt: skip
    print(table(head, rows))
    if options.curves:
        print("\n" + table(["mean loss", *map(str, range(1, 11)), "p"], curve_rows(curves, reference)))
    if options.json:
        about = {
            "benchmark": "training",
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "machine": machine(),
            "versions": {"python": sys.version.split()[0]} | versions(PACKAGES),
            "kernels": status(),
            "load_before": load,
            "task": task,
        }
        result = about | {"trainers": found, "ratios": compared, "reference": reference, "curves": curves}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def tenths(losses: list[float]) -> list[float]:
    """Return the mean of each tenth."""
    size = max(1, len(losses) // 10)
    return [statistics.fmean(losses[i * size : (i + 1) * size] or [float("nan")]) for i in range(10)]


def curve_rows(curves: dict[str, list[list[float]]], reference: str) -> list[list[str]]:
    """Return a line for each trainer: its mean loss in each tenth over the seeds, and the p-value of all ten together.

    That is ten times the least p-value of Welch's test of a tenth (Bonferroni's): of ten, one is small by chance.
    """
    from scipy.stats import ttest_ind

    means = {name: [tenths(losses) for losses in seeds] for name, seeds in curves.items()}
    rows = []
    for name, seeds in means.items():
        together = "-"
        if name != reference and len(seeds) > 1:
            pairs = zip(zip(*seeds, strict=True), zip(*means[reference], strict=True), strict=True)
            together = f"{min(1.0, 10 * min(ttest_ind(a, b, equal_var=False).pvalue for a, b in pairs)):.3f}"
        rows.append([name, *(f"{statistics.fmean(tenth):.4f}" for tenth in zip(*seeds, strict=True)), together])
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
