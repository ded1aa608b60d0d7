"""A noise-conditional score network: one network for the scores at geometric noise levels, by score matching.

    python examples/ncsn.py                    # a mixture in the plane: are its modes found, in their shares?
    python examples/ncsn.py --sliced           # the same without a look at the noise that was added
    python examples/ncsn.py --data digits      # handwritten digits, in ncsn.png

The levels reach up to the largest distance between two of the data, so that a walk can go from any to any other.
The papers feed the network x as it is and weigh the levels by sigma^2. Here EDM scales what goes in and comes out,
and its errors count alike at all levels: in a minute of training the papers' way leaves the largest levels so
inexact that many of the digits are all black or all white.

References:
    Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019)
    https://arxiv.org/abs/1907.05600
    Improved Techniques for Training Score-Based Generative Models (Song & Ermon, 2020), techniques 1 and 3
    https://arxiv.org/abs/2006.09011
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

import reverie as rv
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.score_matching import Denoising, Sliced, fisher_divergence

LEVELS, SMALLEST = 30, 0.02  # noise levels, and the least of them
MODES = 2 * torch.tensor([[math.cos(0.4 * math.pi * k), math.sin(0.4 * math.pi * k)] for k in range(5)])
WIDTH, SHARES = 0.2, torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])


def mixture(schedule: rv.Schedule) -> rv.Mixture:
    """Return five round modes on a circle, of unequal shares."""
    return rv.Mixture(MODES, torch.full((5,), WIDTH), SHARES, schedule)


def train(denoiser: rv.Denoiser, objective: Denoising | Sliced, data: Tensor, times: Tensor, steps: int) -> list[float]:
    """Minimise the objective, each sample at a level of its own; return the losses."""
    adam = torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    losses = []
    for _ in trange(steps, desc="train"):
        x0 = data[torch.randint(len(data), (256 if data.ndim == 2 else 32,))]
        t = times[torch.randint(len(times), (len(x0),))]
        loss = objective(denoiser, x0, t, torch.randn_like(x0)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
        losses.append(loss.item())
    return losses


def judge(denoiser: rv.Denoiser, drawn: Tensor, times: Tensor) -> None:
    """Print what was learned and drawn beside what is true."""
    truth = mixture(denoiser.schedule)
    for t in times[:: len(times) // 5]:
        x0, t = truth.draw(2000, seed=1), t.expand(2000)
        x, sigma = rv.diffuse(truth.schedule, x0, t, rv.normal(x0.shape, 2)), truth.schedule.sigma(t)
        with torch.no_grad():
            error = (sigma**2 * fisher_divergence(denoiser, truth, x, t)).mean()
        print(f"sigma {sigma[0]:6.3f}: Fisher divergence from the truth, times sigma^2: {error:.4f}")
    distance, mode = torch.cdist(drawn, MODES).min(1)
    found = torch.bincount(mode, minlength=5) / len(drawn)
    error = (SHARES * (1 - SHARES) / len(drawn)).sqrt()
    for k in range(5):
        print(f"mode {k}: share {found[k]:.3f}, in truth {SHARES[k]:.3f}, standard error {error[k]:.3f}")
    print(f"farther than five standard deviations from every mode: {(distance > 5 * WIDTH).float().mean():.2%}")


def main() -> None:
    """Train, draw, and judge what was drawn, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("mixture", "digits"), default="mixture")
    parser.add_argument("--sliced", action="store_true", help="sliced score matching; denoising otherwise")
    parser.add_argument("--steps", type=int, help="training steps: 1500, or 1000 for digits")
    parser.add_argument("--count", type=int, help="samples: 4000 points, or 64 digits")
    parser.add_argument("--out", type=Path, default=Path("ncsn.png"), help="the picture of the digits")
    options = parser.parse_args()
    torch.manual_seed(0)

    plane = options.data == "mixture"
    if plane:
        data = mixture(rv.schedules["ve"]()).draw(20_000)
        network: torch.nn.Module = rv.MLP(rv.MLPConfig(in_channels=2))
    else:
        data = rv.open_dataset("digits").images(range(1797)) / 127.5 - 1
        network = rv.UNet(rv.UNetConfig(in_channels=1, channels=(16, 32), layers=1))
    largest = torch.pdist(data[:1000].flatten(1)).max().item()
    schedule = rv.schedules["ve"](sigma_min=SMALLEST, sigma_max=largest)
    grid = rv.grids["log-snr"](schedule, LEVELS)  # the levels, and 0 after them
    size = data.square().mean().sqrt().item()
    denoiser = rv.NetworkDenoiser(network, schedule, rv.predictions["edm"](size))

    def weight(schedule: rv.Schedule, t: Tensor) -> Tensor:
        """Return the weight that turns the score's error into that of the network's output."""
        return schedule.variance(t) * (1 + schedule.variance(t) / size**2)

    objective = Sliced() if options.sliced else Denoising(weight)  # the slices' noise would be weighed as well
    losses = train(denoiser, objective, data, grid[:-1], options.steps or (1500 if plane else 1000))
    first, last = (torch.tensor(part).mean() for part in (losses[:100], losses[-100:]))
    print(f"loss of the first 100 steps {first:.3f}, of the last {last:.3f}")
    count = options.count or (4000 if plane else 64)
    drawn = sample(rv.DDIM(eta=1.0), denoiser.eval(), data.shape[1:], grid, rv.Noise(range(count)))
    if plane:
        judge(denoiser, drawn, grid[:-1])
    else:
        rv.grid_picture(rv.to_uint8(drawn)).save(options.out)
        print(f"the samples are {options.out}")


if __name__ == "__main__":
    main()
