r"""Nearest neighbours among many points, and what they say of copies.

A generator that repeats what it was trained on draws samples that lie nearer to the training set than images do that
nobody trained on. With d the distance to the nearest training image,

    share = P(d(sample) < d(held out)) + P(d(sample) = d(held out)) / 2,                              (1)

is 1/2 for a generator that draws as the data does, whatever the data, and near 1 for copies: Mann's and Whitney's U,
divided by n m. Under the first its variance is (n + m + 1) / (12 n m), so that

    z = (share - 1/2) / sqrt((n + m + 1) / (12 n m))                                                 (2)

is standard normal. Samples that are smoother than the data lie nearer too, so a large z says "look at the picture".

References:
    A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan et al., 2020), section 3
    https://arxiv.org/abs/2004.05675
    On a Test of Whether one of Two Random Variables is Stochastically Larger (Mann & Whitney, 1947)
    https://doi.org/10.1214/aoms/1177730491
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from reverie.base.errors import UsageError

Points = Float[Tensor, "_ d"]
CHUNK = 1 << 24  # distances at a time


def squared_distances(x: Points, y: Points) -> Float[Tensor, "m n"]:
    """Return |x_i - y_j|^2 (M, N), in float64; of bytes without any rounding.

    Example:
        >>> squared_distances(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0]])).tolist()
        [[1.0], [4.0]]
    """
    x, y = x.double(), y.double()
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)


def nearest(x: Points, y: Points) -> tuple[Float[Tensor, " m"], Int64[Tensor, " m"]]:
    """Return the distance (M,) of each x_i (M, D) to the nearest of y (N, D), and which that is (M,).

    Example:
        >>> nearest(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [4.0]]))
        (tensor([1., 1.], dtype=torch.float64), tensor([0, 1]))
    """
    rows = max(1, CHUNK // len(y))
    index = torch.cat([squared_distances(part, y).argmin(1) for part in x.split(rows)])
    return (x.double() - y[index].double()).norm(dim=1), index


@dataclass(frozen=True)
class Copying:
    """How samples and held-out images lie to the training images.

    Arguments:
        share: (1).
        z: (2).
        samples: The median distance of the samples, root mean square over pixels, in grey levels of 255.
        held_out: That of the held-out images.
        least: The least distance of a sample.
    """

    share: float
    z: float
    samples: float
    held_out: float
    least: float

    @property
    def standard_error(self) -> float:
        """The standard deviation that the share has for a generator that draws as the data does."""
        return abs(self.share - 0.5) / abs(self.z) if self.z else 0.0


def flat(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Return images as points whose distance is the root mean square difference of their grey levels.

    Example:
        >>> flat(torch.full((1, 1, 2, 2), 8, dtype=torch.uint8))
        tensor([[4., 4., 4., 4.]])
    """
    return images.flatten(1).float() / math.sqrt(images[0].numel())


def copying(samples: Float[Tensor, " n"], held_out: Float[Tensor, " m"]) -> Copying:
    """Return what distances to the nearest training image say, the samples' (N,) and the held-out images' (M,).

    Raises:
        UsageError: There is none of the one or the other.

    Example:
        >>> copying(torch.zeros(3), torch.ones(4)).share
        1.0
    """
    n, m = len(samples), len(held_out)
    if not n or not m:
        raise UsageError(f"{n} samples and {m} held-out images; copies are judged by both")
    order = held_out.double().sort().values
    below = torch.searchsorted(order, samples.double(), right=False)
    until = torch.searchsorted(order, samples.double(), right=True)
    share = float((m - (below + until).double() / 2).mean() / m)
    z = (share - 0.5) / math.sqrt((n + m + 1) / (12 * n * m))
    return Copying(share, z, float(samples.median()), float(held_out.median()), float(samples.min()))
