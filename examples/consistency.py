"""One step instead of many: a diffusion model of a mixture in the plane is turned into a consistency model.

    python examples/consistency.py                         # easy consistency tuning of a diffusion model
    python examples/consistency.py --method consistency    # distillation of its probability-flow ODE
    python examples/consistency.py --method training       # improved consistency training, without any model before it

A consistency function takes noise to where the probability-flow ODE ends. Of a mixture that map is known, by fine
integration of its exact velocity, and so the error of what was trained can be printed: the distance from the map, over
many points of pure noise, beside that of the diffusion model's one step, which is the mean of the data.

References:
    Consistency Models Made Easy (Geng et al., 2024)
    https://arxiv.org/abs/2406.14548
    Consistency Models (Song et al., 2023)
    https://arxiv.org/abs/2303.01469
"""

import argparse
import math
from copy import deepcopy

import torch
from torch import Tensor
from tqdm import trange

import reverie as rv
from reverie.diffusion.few_step.consistency import Consistency
from reverie.diffusion.few_step.easy_consistency import EasyConsistency
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.objectives import Objective, Simple
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.consistency import Consistency as Sampler
from reverie.diffusion.times import LogNormalTimes
from reverie.training.ema import EMA

MODES = torch.tensor([[math.cos(0.4 * math.pi * k), math.sin(0.4 * math.pi * k)] for k in range(5)])
WIDTH, SHARES = 0.1, torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])


def mixture(schedule: rv.Schedule) -> rv.Mixture:
    """Return five round modes on a circle, of unequal shares."""
    return rv.Mixture(MODES, torch.full((5,), WIDTH), SHARES, schedule)


def train(denoiser: rv.NetworkDenoiser, objective: Objective, times: LogNormalTimes, steps: int, rate: float) -> None:
    """Minimise the objective, and leave the averaged weights in the network."""
    data = mixture(denoiser.schedule).draw(50_000)
    adam = torch.optim.Adam(denoiser.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    average = EMA(denoiser.network, 0.995)
    for step in trange(steps, desc=type(objective).__name__):
        x0 = data[torch.randint(len(data), (256,))]
        objective.begin(step)
        loss = objective(denoiser, x0, times(len(x0), 0, step).t, torch.randn_like(x0)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
        average.update(step)
    denoiser.network.load_state_dict(average.state())


def judge(name: str, denoiser: rv.Denoiser, count: int) -> None:
    """Print how far its one step is from the exact map, and where one and two steps lead."""
    truth, schedule = mixture(denoiser.schedule), denoiser.schedule
    noise = rv.Noise(range(count))
    grid = rv.grids["angle"](schedule, 1)
    start = schedule.prior_std(torch.ones(1)) * noise((2,), [0] * count)
    exact = Exact(truth, 1e-4)(start, torch.ones(count, dtype=torch.float64)).x0
    for steps in (1, 2):
        grid = rv.grids["angle"](schedule, steps)
        drawn = sample(Sampler(), denoiser, (2,), grid, noise)
        distance, share = to_modes(drawn)
        error = f"{(drawn - exact).square().sum(1).mean().sqrt():.3f}" if steps == 1 else "    -"
        print(
            f"{name}, {steps} steps: distance from the exact map {error}; stray points {distance:.2%}; "
            f"largest error of a share {(share - SHARES).abs().max():.3f}"
        )


def to_modes(points: Tensor) -> tuple[float, Tensor]:
    """Return the share of points farther than five standard deviations from every mode, and the share of each mode."""
    distance, mode = torch.cdist(points, MODES).min(1)
    return float((distance > 5 * WIDTH).float().mean()), torch.bincount(mode, minlength=5) / len(points)


def main() -> None:
    """Train a diffusion model, make it one of a single step, and judge both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("easy-consistency", "consistency", "training"), default="easy-consistency")
    parser.add_argument("--teach", type=int, default=2000, help="steps of the diffusion model's training")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the consistency model's")
    parser.add_argument("--count", type=int, default=2000, help="points that are judged")
    options = parser.parse_args()
    torch.manual_seed(0)

    schedule = rv.schedules["edm"]()
    size = mixture(schedule).draw(10_000).square().mean().sqrt().item()
    network = rv.MLP(rv.MLPConfig(in_channels=2, width=64, time_features="fourier"))
    denoiser = rv.NetworkDenoiser(network, schedule, rv.predictions["edm"](size))
    if options.method != "training":
        train(denoiser, Simple("edm"), LogNormalTimes(schedule, -0.5, 1.5), options.teach, 2e-3)
        judge("diffusion model", denoiser, options.count)
    teacher = deepcopy(denoiser).requires_grad_(False)
    objective: Objective = {
        "easy-consistency": lambda: EasyConsistency(options.steps),
        "consistency": lambda: Consistency(options.steps, teacher, last=40),
        "training": lambda: Consistency(options.steps, first=10, last=160),
    }[options.method]()
    train(denoiser, objective, LogNormalTimes(schedule, -0.5, 2.0), options.steps, 1e-3)
    judge(options.method, denoiser, options.count)


if __name__ == "__main__":
    main()
