"""The figure of the EDM2 page: magnitudes of activations and weights as training goes on, beside a plain U-Net's.

python docs/figures/magnitudes.py        (ten minutes on one core)
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import reverie as rv
from reverie.diffusion.objectives import Simple
from reverie.diffusion.times import LogNormalTimes
from reverie.networks.layers import ResidualBlock

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "reverie"  # the same bytes each time
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of what draws

FILE = Path(__file__).parent.parent / "images" / "magnitudes.svg"
STEPS, EVERY, BATCH = 6000, 100, 32
COLOURS = {"EDM2": "#00798c", "U-Net": "#d1495b"}


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the residual blocks of either network, in the order of their call."""
    if isinstance(network, rv.EDM2):
        return [*network.encoder, *network.decoder]
    return [module for module in network.modules() if isinstance(module, ResidualBlock)]


def listen(network: nn.Module) -> Callable[[], list[float]]:
    """Return a function that gives the magnitudes of what each block gave in the last forward pass."""
    seen: dict[int, float] = {}

    def hook(index: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: seen.__setitem__(index, float(output.detach().square().mean().sqrt()))

    for index, block in enumerate(blocks(network)):
        block.register_forward_hook(hook(index))
    return lambda: [seen[index] for index in sorted(seen)]


def lengths(network: nn.Module) -> list[float]:
    """Return the magnitude of each layer's weight within the blocks."""
    weights = [w for block in blocks(network) for w in block.parameters() if w.ndim > 1]
    return [float(w.detach().square().mean().sqrt()) for w in weights]


def trained(network: nn.Module, rate: float) -> Iterator[tuple[int, list[float], list[float]]]:
    """Train on digits; yield the step, the activations' magnitudes and the weights'."""
    schedule, times = rv.schedules["edm"](), LogNormalTimes(rv.schedules["edm"]())
    denoiser, objective = rv.NetworkDenoiser(network, schedule, "edm"), Simple("edm")
    digits = rv.open_dataset("digits")
    images = digits.images(range(len(digits))).float() / 127.5 - 1
    heard, adam = listen(network), torch.optim.Adam(network.parameters(), rate, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS + 1):
        x0 = images[torch.randint(len(images), (BATCH,), generator=draw)]
        eps = torch.randn(x0.shape, generator=draw)
        loss = objective(denoiser, x0, times(BATCH, 0, "figure", step).t, eps).mean()
        if step % EVERY == 0:
            yield step, heard(), lengths(network)
        adam.zero_grad()
        loss.backward()
        adam.step()
        for module in network.modules():
            if hasattr(module, "after_update"):
                module.after_update()


def main() -> None:
    """Train both and draw the figure."""
    torch.manual_seed(0)
    networks = {
        "EDM2": (rv.EDM2(rv.EDM2Config(in_channels=1, channels=(16, 32), layers=1)), 0.02),
        "U-Net": (rv.UNet(rv.UNetConfig(in_channels=1, channels=(16, 32), layers=1)), 2e-3),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, (network, rate) in networks.items():
        steps, activations, weights = zip(*trained(network, rate), strict=True)
        weights = [[now / start for now, start in zip(row, weights[0], strict=True) if start > 0] for row in weights]
        for axes, rows in ((left, activations), (right, weights)):
            low, middle, high = (torch.tensor([list(row) for row in rows]).quantile(q, 1) for q in (0.0, 0.5, 1.0))
            axes.plot(steps, middle, color=COLOURS[name], label=name, linewidth=1.4)
            axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            print(f"{name}: {float(low[-1]):.3g} to {float(high[-1]):.3g}, median {float(middle[-1]):.3g}")
    left.set(xlabel="step", ylabel="magnitude of a block's output", yscale="log", xlim=(0, STEPS))
    right.set(xlabel="step", ylabel="magnitude of a weight, over its first", yscale="log", xlim=(0, STEPS))
    left.legend(frameon=False)
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
