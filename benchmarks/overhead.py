r"""Sampler overhead: all of a step that is not the network, ours beside diffusers' schedulers, in one run.

    python benchmarks/overhead.py --json overhead.json

times a step on a latent (1, 4, 64, 64) in float32, on one thread, with a network that returns a tensor it has. Ours is
the whole loop of `run` (times, the prediction's conversion, the step, the check for finite numbers) divided by its
steps; theirs is scale_model_input and step, as their pipelines call them, divided likewise. Medians of runs that
alternate; the first run of each is left out.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine, table, versions
from torch import nn

from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.registry import grids, samplers, schedules
from reverie.diffusion.samplers.base import run, start

SHAPE = (4, 64, 64)
PAIRS = {  # ours: theirs
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
PACKAGES = ("reverie", "torch", "diffusers")


class Returns(nn.Module):
    """A network that costs nothing."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.output


def ours(name: str, steps: int) -> Callable[[], float]:
    """Return a function that runs a sampler and returns microseconds a step."""
    schedule = schedules["linear"]()
    denoiser = NetworkDenoiser(Returns(0.1 * torch.ones(1, *SHAPE)), schedule, "eps")
    sampler, grid, noise = samplers[name](), grids["trailing"](schedule, steps), Noise([0])

    def go() -> float:
        first = start(sampler, schedule, SHAPE, 1.0, noise)
        began = time.perf_counter()
        for _ in run(sampler, denoiser, first, grid, noise):
            pass
        return (time.perf_counter() - began) / steps * 1e6

    return go


def theirs(name: str, settings: dict[str, object], steps: int) -> Callable[[], float]:
    """Return a function that runs a scheduler and returns microseconds a step."""
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, timestep_spacing="trailing", **settings)
    output = 0.1 * torch.ones(1, *SHAPE)

    def go() -> float:
        scheduler.set_timesteps(steps)
        x = torch.randn(1, *SHAPE) * scheduler.init_noise_sigma
        began = time.perf_counter()
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        return (time.perf_counter() - began) / len(scheduler.timesteps) * 1e6

    return go


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (peer, settings) in PAIRS.items():
        pair = ours(name, options.steps), theirs(peer, settings, options.steps)
        rows = [[go() for go in pair] for _ in range(options.runs + 1)][1:]
        own, other = (statistics.median(row[i] for row in rows) for i in (0, 1))
        found[name] = {"scheduler": peer, "ours_us": own, "theirs_us": other, "ratio": own / other}
    rows = [
        [name, row["scheduler"], f"{row['ours_us']:.0f}", f"{row['theirs_us']:.0f}", f"{row['ratio']:.2f}"]
        for name, row in found.items()
    ]
    print(table(["sampler", "scheduler", "ours, us", "theirs, us", "ratio"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | {"samplers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
