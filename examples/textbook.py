"""DDPM as the textbooks show it, on reverie's objects: train on handwritten digits, and sample from T to 0.

    python examples/textbook.py --steps 1000 --out textbook.png

Everything that reverie does besides (averages of weights, checkpoints, classes, grids with fewer steps) is left out.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import trange

import reverie as rv


def train(denoiser: rv.NetworkDenoiser, images: Tensor, steps: int, batch: int, timesteps: int) -> list[float]:
    """Algorithm 1 of DDPM; return the losses."""
    adam = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    losses = []
    for _ in trange(steps, desc="train"):
        x0 = images[torch.randint(len(images), (batch,))]
        t = denoiser.schedule.time_of_timestep(torch.randint(timesteps, (batch,)))
        eps = torch.randn_like(x0)
        x = rv.diffuse(denoiser.schedule, x0, t, eps)
        loss = mse_loss(denoiser(x, t).eps, eps)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def sample(denoiser: rv.Denoiser, shape: tuple[int, ...], count: int, timesteps: int) -> Tensor:
    """Algorithm 2 of DDPM: from t = 1 to t = 0, one timestep after another, x_0 kept in [-1, 1] as its authors do."""
    noise, sampler, clipped = rv.Noise(range(count)), rv.DDPM(), rv.Clipped(denoiser)
    state = sampler.init(noise(shape, [0] * count), t=1.0)
    for i in trange(timesteps - 1, -1, -1, desc="sample"):
        state = sampler.step(clipped, state, i / timesteps, noise)
    return state.x


def main() -> None:
    """Train, sample, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("textbook.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=64, help="images in a step")
    parser.add_argument("--timesteps", type=int, default=1000, help="T")
    parser.add_argument("--count", type=int, default=16, help="samples")
    options = parser.parse_args()
    torch.manual_seed(0)

    digits = rv.open_dataset("digits")
    images = digits.images(range(len(digits))) / 127.5 - 1
    network = rv.UNet(rv.UNetConfig(in_channels=1, channels=(32, 64)))
    denoiser = rv.NetworkDenoiser(network, rv.schedules["cosine"](timesteps=options.timesteps), "eps")

    losses = train(denoiser, images, options.steps, options.batch, options.timesteps)
    samples = sample(denoiser.eval(), digits.shape, options.count, options.timesteps)
    rv.grid_picture(rv.to_uint8(samples)).save(options.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the samples are {options.out}")


if __name__ == "__main__":
    main()
