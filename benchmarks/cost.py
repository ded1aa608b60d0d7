"""Cost as work grows: seconds and memory of a training step and of sampling, against batch, resolution and steps.

    python benchmarks/cost.py --json cost.json --figure docs/images/cost.svg

The small U-Net (channels 32, 64, 64; attention at the second level). One thing grows at a time: the batch at 32x32,
the side at a batch of 4, the steps of sampling 4 images of 32x32. Each measurement is a process of its own, so that its
peak memory is its own; what the process has before its first step is taken off. Time is the process's CPU time on the
CPU, wall time on a GPU; the best of a few runs.

Printed beside each table is the exponent p of cost = a n^p, fitted to the upper half of the points, where what does
not grow weighs least: batch and steps are linear, p = 1, and a side is quadratic in pixels, p = 2, and more by the
attention over all pairs of pixels, p = 4 of a share of the step.
"""

import argparse
import json
import math
import multiprocessing as mp
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GROWS = {
    "training, batch": ("batch", (1, 2, 4, 8, 16, 32)),
    "training, side": ("size", (16, 32, 64, 128)),
    "sampling, steps": ("steps", (2, 4, 8, 16, 32)),
}
BASE = {"batch": 4, "size": 32, "steps": 8}


def measured(kind: str, work: dict[str, int], dtype: str, threads: int, runs: int, pipe: Any) -> None:
    """Be a process that does some work a few times, and send its best seconds and its peak memory in MiB."""
    import torch

    import reverie as rv
    from reverie.kernels.memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = rv.UNetConfig(in_channels=1, channels=(32, 64, 64), attention=(False, True, False), head_dim=8)
    network = rv.UNet(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = rv.NetworkDenoiser(
        network, rv.schedules["cosine"](), "v", dtype=torch.bfloat16 if dtype == "bfloat16" else None
    )
    shape = (work["batch"], 1, work["size"], work["size"])
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    act = training(denoiser, x) if kind.startswith("training") else sampling(denoiser, x, work["steps"])
    before, times = memory(), []
    for _ in range(runs + 1):  # the first finds memory and is not counted
        began = clock(device)
        act()
        times.append(clock(device) - began)
    pipe.send((min(times[1:]), memory() - before))


def training(denoiser: Any, x: Any) -> Callable[[], None]:
    """Return a training step."""
    import torch

    t, eps = torch.rand(len(x), device=x.device, dtype=torch.float64), torch.randn_like(x)
    adam = torch.optim.AdamW(denoiser.parameters(), fused=True)

    def step() -> None:
        (denoiser(x, t).eps - eps).square().mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def sampling(denoiser: Any, x: Any, steps: int) -> Callable[[], None]:
    """Return what draws images by DDIM."""
    import torch

    import reverie as rv

    def draw() -> None:
        sampler, noise = rv.DDIM(), rv.Noise(range(len(x)))
        state = sampler.init(x, t=1.0)
        with torch.no_grad():
            for i in reversed(range(steps)):
                state = sampler.step(denoiser, state, i / steps, noise)

    return draw


def clock(device: str) -> float:
    """Return the seconds of the processor, or of the wall once a GPU has done all."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> float:
    """Return the peak of memory so far in MiB: the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Return p of cost = a n^p by least squares of the logarithms, of the upper half of the points.

    Example:
        >>> round(exponent([(1, 9.0), (2, 4.0), (4, 16.0), (8, 64.0)]), 3)
        2.0
    """
    upper = points[len(points) // 2 - 1 :]
    logs = [(math.log(n), math.log(max(cost, 1e-9))) for n, cost in upper]
    mean_n, mean_c = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((n - mean_n) * (c - mean_c) for n, c in logs) / sum((n - mean_n) ** 2 for n, _ in logs)


def context() -> Any:
    """Return how processes are made: by a fork, which imports nothing again, but where a GPU is in use."""
    import torch

    import reverie as rv

    _ = rv.UNet, rv.NetworkDenoiser, rv.DDIM, rv.Noise, rv.schedules["cosine"]  # imported once, here
    return mp.get_context("fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn")


def measure(kind: str, dtype: str, threads: int, runs: int) -> list[tuple[int, float, float]]:
    """Return what grows, seconds and MiB, point by point."""
    name, values = GROWS[kind]
    points, made = [], context()
    for value in values:
        here, there = made.Pipe()
        work = BASE | {name: value}
        process = made.Process(target=measured, args=(kind, work, dtype, threads, runs, there))
        process.start()
        there.close()
        seconds, mib = here.recv()
        process.join()
        points.append((value, seconds, mib))
        print(f"{kind} {value}: {seconds:.3f} s, {mib:.0f} MiB", file=sys.stderr, flush=True)
    return points


def draw(found: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Write the figure: time and memory against each thing that grows, on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reverie"
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, len(found), figsize=(8, 4.6), layout="constrained", sharex="col", squeeze=False)
    for column, (kind, points) in enumerate(found.items()):
        for row, (part, label) in enumerate(((1, "seconds"), (2, "MiB"))):
            axes, pairs = rows[row][column], [(point[0], point[part]) for point in points]
            axes.loglog(*zip(*pairs, strict=True), "o-", markersize=3, linewidth=1)
            axes.set_title(f"{label}, p = {exponent(pairs):.2f}", fontsize=8)
            axes.tick_params(labelsize=7)
        rows[1][column].set_xlabel(kind, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--only", default=",".join(GROWS).replace(", ", " "), help="of: training batch, training side, sampling steps")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add("--threads", type=int, default=1)
    add("--runs", type=int, default=3, help="runs that count, of which the best does (default: 3)")
    add("--figure", type=Path, help="write the plot to this SVG")
    add("--json", type=Path, help="write one object with everything to this file")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in GROWS if kind.replace(", ", " ") in options.only.split(",")]
    if not kinds or options.runs < 1:
        parser.error("--only names nothing that there is, or --runs is below 1")
    from report import gpu_or_not, machine, table, versions

    gpu_or_not()
    found = {kind: measure(kind, options.dtype, options.threads, options.runs) for kind in kinds}
    for kind, points in found.items():
        fits = [exponent([(p[0], p[part]) for p in points]) for part in (1, 2)]
        print(f"\n{kind}: seconds ~ n^{fits[0]:.2f}, memory ~ n^{fits[1]:.2f}\n")
        print(table(["n", "seconds", "MiB"], [[str(n), f"{seconds:.3f}", f"{mib:.0f}"] for n, seconds, mib in points]))
    if options.figure:
        draw(found, options.figure)
    if options.json:
        about = {
            "benchmark": "cost", "command": shlex.join([Path(sys.executable).name, *sys.argv]), "machine": machine(),
            "versions": versions(("reverie", "torch")), "dtype": options.dtype, "threads": options.threads,
        }  # fmt: skip
        options.json.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
