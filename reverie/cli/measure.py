r"""What this machine does, measured in seconds: its speed in each dtype, and whether a sample's bits are its own.

Speed is work over time: a convolution of B images takes 2 B C_out C_in 9 H W operations, a product of
(N, N) matrices 2 N^3; the best of several runs counts, since whatever else runs only ever slows one down.

The promise. Sample i of a seed is to be the same alone and in company. A network's output for a row depends
on the batch's size in float32, because matrix products choose their blocking by it, but not on the
neighbours nor on the place at a fixed size: so says experience, and here it is tried on a small U-Net with
random weights, row by row and bit by bit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.kernels.packed import packs
from reverie.models.speed import fast_dtype
from reverie.networks.packed import pack
from reverie.networks.unet import UNet, UNetConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (16, 28)  # pixels a side; a power of two, and one that is none
BUCKET = 8


class Claim(NamedTuple):
    """When a sample's bits stay the same, and whether they do here; None: there was nothing to compare."""

    claim: str
    dtype: str
    holds: bool | None


def speeds(seconds: float = 0.3) -> dict[str, Any]:
    """Return GFLOP/s of a convolution and a matrix product and images/s of training a small U-Net, by dtype.

    Arguments:
        seconds: How long to measure each.
    """
    measured: dict[str, dict[str, float]] = {
        "convolution": {name: convolution(dtype, seconds) for name, dtype in DTYPES.items()},
        "matrix_product": {name: product(dtype, seconds) for name, dtype in DTYPES.items()},
        "training": {name: training(dtype, seconds) for name, dtype in DTYPES.items()},
    }
    gain = measured["training"]["bfloat16"] / measured["training"]["float32"]
    return {**measured, "bfloat16_gain": round(gain, 2), "recommended": "bfloat16" if gain > 1.1 else "float32"}


def convolution(dtype: torch.dtype, seconds: float, batch: int = 8, channels: int = 64, size: int = 32) -> float:
    """Return the GFLOP/s of a 3x3 convolution in channels-last."""
    x = torch.randn(batch, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    work = 2 * batch * channels**2 * 9 * size**2
    return round(work / best_time(lambda: F.conv2d(x, weight, padding=1), seconds) / 1e9, 1)


def product(dtype: torch.dtype, seconds: float, size: int = 768) -> float:
    """Return the GFLOP/s of a product of square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return round(2 * size**3 / best_time(lambda: a @ b, seconds) / 1e9, 1)


def training(dtype: torch.dtype, seconds: float, batch: int = 8) -> float:
    """Return the images/s of forward and backward passes of a small U-Net at 32x32."""
    network = small_unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, t = torch.randn(batch, 1, 32, 32).to(memory_format=torch.channels_last), torch.rand(batch) * 1000

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = network(x, t).float().square().mean()
        loss.backward()
        network.zero_grad()

    return round(batch / best_time(step, seconds), 1)


@torch.no_grad()
def fast(seconds: float = 0.3, batch: int = 8) -> dict[str, Any]:
    """Return what `--speed fast` does on this CPU: its dtype, whether weights are laid out, its gain and its error.

    Arguments:
        seconds: How long to measure each.
        batch: Images in a call of the small U-Net, of 32x32.
    """
    exact, other = (small_unet().to(memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    dtype = fast_dtype(torch.device("cpu")) or torch.float32
    pack(other, dtype)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 1, 32, 32, generator=generator), 1000 * torch.rand(batch, generator=generator)
    times = [best_time(lambda network=network: network(x, t), seconds) for network in (exact, other)]  # type: ignore[misc]
    wanted = exact(x, t)
    error = float((other(x, t) - wanted).norm() / wanted.norm())
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "packed": packs(), "gain": round(times[0] / times[1], 2), "error": error}


def best_time(work: Callable[[], Any], seconds: float) -> float:
    """Return the shortest time that some work takes, of as many runs as fit, and two at least."""
    work()  # the first run also finds memory and builds kernels
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def small_unet(seed: int = 0) -> UNet:
    """Return a small U-Net with attention, its weights all random: as it starts, its output would be zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(UNetConfig(in_channels=1, channels=(32, 64), layers=1, attention=(False, True)))
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
    return network.eval()


# The promise ----------------------------------------------------------------------------------


def promise() -> list[Claim]:
    """Return what exact sampling rests on, each tried on this machine."""
    network = small_unet()
    claims = []
    for name, dtype in DTYPES.items():
        run = Runner(network, dtype)
        claims += [
            Claim("from run to run", name, all(run.repeats(size) for size in SIZES)),
            Claim("in any place, among any others", name, all(map(run.unmoved, SIZES))),
            Claim("at any batch size", name, all(run.any_batch(size) for size in SIZES)),
            Claim("with one thread and with all", name, run.any_threads()),
        ]
    return claims


class Runner:
    """A network and a dtype, tried in several ways.

    Arguments:
        network: The network.
        dtype: Its arithmetic.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.network, self.dtype = network, dtype

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.network(x, t)

    def inputs(self, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return a bucket of images and times."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(BUCKET, 1, size, size, generator=generator), 1000 * torch.rand(BUCKET, generator=generator)

    def repeats(self, size: int) -> bool:
        """Whether a second run gives the same bits."""
        x, t = self.inputs(size)
        return torch.equal(self(x, t), self(x, t))

    def unmoved(self, size: int, trials: int = 4) -> bool:
        """Whether a row comes out the same in other places of the batch, among other neighbours."""
        x, t = self.inputs(size)
        row = self(x, t)[0]
        for trial in range(trials):
            others, times = self.inputs(size, seed=1 + trial)
            place = (3 * trial + 1) % BUCKET
            others[place], times[place] = x[0], t[0]
            if not torch.equal(self(others, times)[place], row):
                return False
        return True

    def any_batch(self, size: int) -> bool:
        """Whether rows come out the same in batches of other sizes."""
        x, t = self.inputs(size)
        among = self(x, t)
        return all(torch.equal(self(x[:count], t[:count]), among[:count]) for count in (1, 2, 3, 5))

    def any_threads(self) -> bool | None:
        """Whether one thread gives the same bits as all; None where there is one alone."""
        if torch.get_num_threads() == 1:
            return None
        inputs = [self.inputs(size) for size in SIZES]
        outputs = [self(*pair) for pair in inputs]
        with threads(1):
            return all(torch.equal(self(*pair), output) for pair, output in zip(inputs, outputs, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
