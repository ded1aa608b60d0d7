r"""From bytes to a density and back: dequantisation.

A byte k is the cell [k - 1/2, k + 1/2). With a place u in [0, 1) drawn from q(u | k) within each cell, the density p of

    x = (k + u - 1/2) / 127.5 - 1,                                                                  (1)

in whose range the cells' centres are the data that a model was trained on, bounds the probability from below:

    ln P(k) >= E_q[ln p(x) - dims ln 127.5 - ln q(u | k)].                                          (2)

The uniform q makes ln q = 0. A q that is learned comes closer to p within the cell, where the two are equal: here
each pixel's u is a Gaussian through the logistic function, its mean and its scale made from the picture by a small
network, trained on (2) with the model's own score for the gradient of ln p.

References:
    A note on the evaluation of generative models (Theis et al., 2016), section 3.1
    https://arxiv.org/abs/1511.01844
    Flow++: Improving Flow-Based Generative Models with Variational Dequantization (Ho et al., 2019), section 3.1
    https://arxiv.org/abs/1902.00275
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from reverie.base.errors import UsageError
from reverie.base.randomness import generator, normals, torch_seed, uniform
from reverie.diffusion.denoisers import Condition, Denoiser

Key = tuple[int | str, ...]
HALF = 127.5


def spread(images: UInt8[Tensor, "*d"], u: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Return the x of bytes and of places u in [0, 1) within their cells: equation (1).

    Example:
        >>> spread(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0.5, 0.5]))
        tensor([-1.,  1.])
    """
    return (images.to(u) + u - 0.5) / HALF - 1


def log_cell() -> float:
    """Return the logarithm of a cell's width, -ln 127.5: what each dimension adds to ln p."""
    return -math.log(HALF)


@runtime_checkable
class Dequantiser(Protocol):
    """Anything that draws places within the cells of bytes."""

    def draw(self, images: UInt8[Tensor, "b *d"], keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return places u (B, *D) in [0, 1], fixed by each sample's key, and ln q(u | images) (B,)."""


class Uniform:
    """Every place as likely as every other."""

    def draw(self, images: UInt8[Tensor, "b *d"], keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return places u (B, *D) in [0, 1), fixed by each sample's key, and ln q(u | images) = 0 (B,)."""
        u = torch.stack([uniform(images.shape[1:], *key) for key in keys]).to(images.device)
        return u, torch.zeros_like(u.flatten(1)[:, 0])


class Logistic(nn.Module):
    """u = sigmoid(m + s eps), m and s for each pixel from its neighbourhood of 7 by 7.

    Arguments:
        channels: The images' channels.
        width: Of the network's layers.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def draw(self, images: UInt8[Tensor, "b c h w"], keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return places u (B, C, H, W) in [0, 1], fixed by each sample's key, and ln q(u | images) (B,)."""
        like = self.last.weight
        hidden = silu(self.second(silu(self.first(images.to(like) / HALF - 1))))
        m, log_s = self.last(hidden).chunk(2, dim=1)
        log_s = log_s + math.log(1.6)  # the flattest of them, before it has learned
        eps = normals(images.shape[1:], keys).to(like)
        logit = m + log_s.exp() * eps
        log_slope = logsigmoid(logit) + logsigmoid(-logit)  # ln du / d logit
        log_q = -0.5 * eps.square() - 0.5 * math.log(2 * math.pi) - log_s - log_slope
        return logit.sigmoid(), log_q.flatten(1).sum(1)


def train_dequantiser(
    dequantiser: Logistic,
    denoiser: Denoiser,
    images: UInt8[Tensor, "n c h w"],
    steps: int,
    condition: Condition | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    t: float | None = None,
    seed: int = 0,
) -> None:
    """Train a dequantiser by gradient ascent on (2), the denoiser's score at its first time being that of ln p.

    Arguments:
        dequantiser: What is trained, in place.
        denoiser: The model, which stays as it is.
        images: Bytes (N, C, H, W), better not those that the likelihood is for.
        steps: How many steps of Adam.
        condition: The images' condition, N rows.
        batch_size: Images in a step.
        learning_rate: Adam's.
        t: The first time, by default the schedule's t_min.
        seed: Fixes batches and draws.
    """
    if steps < 1 or batch_size < 1:
        raise UsageError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1")
    adam = torch.optim.Adam(dequantiser.parameters(), lr=learning_rate)
    dtype = dtype_of(denoiser, torch.float64)
    first = denoiser.schedule.t_min if t is None else t
    times = torch.full((batch_size,), first, dtype=torch.float64, device=images.device)
    alpha, sigma = denoiser.schedule.marginal(times[:1])
    for step in range(steps):
        rows = torch.from_numpy(generator(seed, "order", step).integers(0, len(images), batch_size)).to(images.device)
        own = None if condition is None else {name: value[rows] for name, value in condition.items()}
        u, log_q = dequantiser.draw(images[rows], [(torch_seed(seed, "train", step), i) for i in range(batch_size)])
        x = spread(images[rows], u)
        with torch.no_grad(), evaluating(denoiser):
            score = -(alpha / sigma).to(dtype) * denoiser((alpha * x).to(dtype), times, own).eps
        loss = (log_q.sum() - (score.to(x) * x).sum()) / x.numel()
        adam.zero_grad()
        loss.backward()
        adam.step()


# The model's part -------------------------------------------------------------------------------


def dtype_of(denoiser: Denoiser, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype that a denoiser's data must have: that of its weights, if it has any."""
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), otherwise)


@contextmanager
def evaluating(denoiser: Denoiser) -> Iterator[None]:
    """A block in which a denoiser has no dropout."""
    modes = {module: module.training for module in denoiser.modules()}
    denoiser.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
