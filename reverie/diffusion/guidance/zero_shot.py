r"""Editing with a consistency model that was trained for none of it: what is known is put back in each round.

An edit knows a linear measurement of the picture, y = M x with M M^T = 1: some pixels, the brightness of colours, the
mean of each block of pixels. Each round estimates the picture, puts the measurement back,

    x_0 <- f(x_t, t),    x_0 <- x_0 + M^T (y - M x_0),                                              (1)

and goes back to less noise for the next (samplers/consistency.py, eq. 1). As (1) makes the estimate agree with y
exactly, so does the result. As a denoiser made of a denoiser it works with any sampler; with that of consistency
models it is the paper's algorithm. What is not known comes out likely beside it, but not drawn from its conditional
distribution: of two pixels of correlation 0.9, one known to be 1.5, the other's mean is 1.19 after 30 rounds, not 1.35.

Between two pictures one goes along the great circle between the noises that make them,

    z = (sin((1 - a) psi) z_1 + sin(a psi) z_2) / sin(psi),    psi = arccos(z_1 . z_2 / |z_1| |z_2|).  (2)

References:
    Consistency Models (Song et al., 2023), algorithm 4, appendix D
    https://arxiv.org/abs/2303.01469
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times, with_x0
from reverie.diffusion.predictions import Data, per_sample


class Measurement(ABC):
    """What is known of a picture: a linear map M with M M^T = 1."""

    @abstractmethod
    def measure(self, x: Data) -> Tensor:
        """Return M x for pictures x (B, *D)."""

    @abstractmethod
    def spread(self, y: Tensor) -> Data:
        """Return M^T y (B, *D)."""

    def put(self, x: Data, y: Tensor) -> Data:
        """Return the picture (B, *D) nearest to x whose measurement is y: equation (1)."""
        return x + self.spread(y - self.measure(x))


class Pixels(Measurement):
    """Some pixels are known: inpainting.

    Arguments:
        mask: 1 where a pixel is known, 0 where not, broadcastable to the pictures (B, *D).

    Raises:
        UsageError: It has other numbers in it.

    Example:
        >>> Pixels(torch.tensor([1.0, 0.0])).put(torch.zeros(1, 2), torch.tensor([[3.0, 0.0]]))
        tensor([[3., 0.]])
    """

    def __init__(self, mask: Tensor) -> None:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UsageError("a mask is 1 where a pixel is known and 0 where not; this one has other numbers")
        self.mask = mask

    def measure(self, x: Data) -> Tensor:
        return x * self.mask.to(x)

    def spread(self, y: Tensor) -> Data:
        return y * self.mask.to(y)

    def put(self, x: Data, y: Tensor) -> Data:
        return torch.where(self.mask.to(x.device) > 0, y, x)  # the known pixels themselves, to the last bit


class Grey(Measurement):
    """The brightness is known, not the colour: colourisation.

    Arguments:
        weights: How much each channel counts; scaled to length 1.

    Example:
        >>> grey = Grey()
        >>> x = torch.rand(1, 3, 2, 2)
        >>> bool((grey.measure(grey.spread(grey.measure(x))) - grey.measure(x)).abs().max() < 1e-6)
        True
    """

    def __init__(self, weights: tuple[float, ...] = (0.2989, 0.5870, 0.1140)) -> None:
        row = torch.tensor(weights, dtype=torch.float64)
        if not row.isfinite().all() or not row.norm() > 0:
            raise UsageError(f"the channels' weights are {weights}; they must be finite, and not all 0")
        self.row = row / row.norm()

    def measure(self, x: Data) -> Tensor:
        return torch.einsum("c,bc...->b...", self.row.to(x), x)[:, None]

    def spread(self, y: Tensor) -> Data:
        return torch.einsum("c,b...->bc...", self.row.to(y), y[:, 0])


class Blocks(Measurement):
    """The mean of each block of pixels is known: super-resolution.

    Arguments:
        factor: Height and width of a block.

    Raises:
        UsageError: factor is below 1; on a call, it does not divide the picture's size.

    Example:
        >>> Blocks(2).put(torch.zeros(1, 1, 2, 2), 2 * torch.ones(1, 1, 1, 1)).tolist()  # a mean of 1
        [[[[1.0, 1.0], [1.0, 1.0]]]]
    """

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise UsageError(f"factor is {factor}; it must be at least 1")
        self.factor = factor

    def measure(self, x: Data) -> Tensor:
        """Return factor times the mean of each block (B, C, H / factor, W / factor)."""
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise UsageError(f"the pictures are {height}x{width}, which {self.factor} does not divide")
        return torch.nn.functional.avg_pool2d(x, self.factor) * self.factor

    def spread(self, y: Tensor) -> Data:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3) / self.factor


class Known(Denoiser):
    """A denoiser whose estimates agree with a measurement: equation (1).

    Arguments:
        denoiser: The consistency model.
        measurement: What is known of the pictures.
        y: The measurement's outcome (B, ...), or one for all.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> known = Known(point, Pixels(torch.tensor([0.0, 1.0])), torch.tensor([[0.0, 5.0]]))
        >>> known(torch.zeros(1, 2), torch.tensor([0.5]).double()).x0
        tensor([[1., 5.]])
    """

    def __init__(self, denoiser: Denoiser, measurement: Measurement, y: Tensor) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.measurement, self.y = denoiser, denoiser.schedule, measurement, y

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        if len(self.y) not in (1, len(x)):
            raise UsageError(f"{len(self.y)} pictures were measured, and {len(x)} are edited; measure one, or as many")
        estimate = self.denoiser(x, t, condition)
        y = self.y.to(x).expand(len(x), *self.y.shape[1:])
        return with_x0(estimate, self.measurement.put(estimate.x0, y), x, t, self.schedule)


def between(first: Data, second: Data, share: Tensor) -> Data:
    """Return noise (B, *D) on the great circle between two noises (B, *D): equation (2).

    Arguments:
        first: The noise at share 0.
        second: The noise at share 1.
        share: How far each is on its way (B,).

    Example:
        >>> between(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))
        tensor([[0.7071, 0.7071]])
    """
    one, other = first.flatten(1), second.flatten(1)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    psi = cosine.clamp(-1 + 1e-7, 1 - 1e-7).arccos()
    share = share.to(psi)
    weights = [((1 - share) * psi).sin() / psi.sin(), (share * psi).sin() / psi.sin()]
    return per_sample(weights[0], first) * first + per_sample(weights[1], second) * second
