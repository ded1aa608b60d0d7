r"""Sampler overhead: all of a step that is not the network, ours beside diffusers' schedulers, in one run.

    python benchmarks/overhead.py --json overhead.json

times a step on a latent (1, 4, 64, 64) in float32, on one thread, with a network that returns a tensor it has, in
microseconds of the thread's own processor time (what the machine does for others meanwhile is not counted) and for each
time that the network is asked (Heun's rule asks twice a step).

Ours is the whole loop of `run`, divided by that: its start, the call of the network, the prediction's conversion, the
step, the check for finite numbers; previews where --previews asks for them. Theirs is scale_model_input and step, as
their pipelines call them, without a network, and without previews. The first run of each is left out: ours works out
its steps then (the column "first"), and theirs builds its tables in set_timesteps, which is not timed either. Medians
of runs that alternate. "draw" is what of ours is a draw of the noise, by itself; theirs draws by torch.randn.
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
from reverie.diffusion.samplers.linear import moves

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
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
COLUMNS = ("ours_us", "draw_us", "first_us", "theirs_us")
PACKAGES = ("reverie", "torch", "diffusers")


class Returns(nn.Module):
    """A network that costs nothing."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.output


def ours(name: str, steps: int, previews: bool = False) -> Callable[[], float]:
    """Return a function that runs a sampler and returns microseconds an evaluation."""
    schedule = schedules["linear"]()
    denoiser = NetworkDenoiser(Returns(0.1 * torch.ones(1, *SHAPE)), schedule, "eps")
    sampler, grid, noise = samplers[name](), grids["trailing"](schedule, steps), Noise([0])
    asked = sampler.count(schedule, grid)

    def go() -> float:
        first = start(sampler, schedule, SHAPE, 1.0, noise)
        began = time.thread_time()
        for _ in run(sampler, denoiser, first, grid, noise, previews):
            pass
        return (time.thread_time() - began) / asked * 1e6

    return go


def theirs(name: str, settings: dict[str, object], steps: int) -> Callable[[], float]:
    """Return a function that runs a scheduler and returns microseconds an evaluation."""
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, timestep_spacing="trailing", **settings)
    output = 0.1 * torch.ones(1, *SHAPE)

    def go() -> float:
        scheduler.set_timesteps(steps)
        x = torch.randn(1, *SHAPE) * scheduler.init_noise_sigma
        began = time.thread_time()
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        return (time.thread_time() - began) / len(scheduler.timesteps) * 1e6

    return go


def draw(runs: int) -> float:
    """Return the microseconds of one draw of the noise."""
    noise, times = Noise([0]), []
    for k in range(runs):
        began = time.thread_time()
        noise(SHAPE, [k])
        times.append((time.thread_time() - began) * 1e6)
    return statistics.median(times)


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--previews", action="store_true", help="make x0 at each step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (peer, settings) in PAIRS.items():
        pair = ours(name, options.steps, options.previews), theirs(peer, settings, options.steps)
        moves.cache_clear()
        first = pair[0]()
        rows = [[go() for go in pair] for _ in range(options.runs + 1)][1:]
        own, other = (statistics.median(row[i] for row in rows) for i in (0, 1))
        drawn = draw(100) if samplers[name]().stochastic else 0.0
        figures = {"ours_us": own, "draw_us": drawn, "first_us": first, "theirs_us": other, "ratio": own / other}
        found[name] = {"scheduler": peer, **figures}
    lines = [
        [name, str(row["scheduler"]), *(f"{row[key]:.0f}" for key in COLUMNS), f"{row['ratio']:.2f}"]
        for name, row in found.items()
    ]
    print(table(["sampler", "scheduler", "ours, us", "draw", "first", "theirs, us", "ratio"], lines))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | {"samplers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
