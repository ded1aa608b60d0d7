r"""The kernel distance between two sets of features: a squared maximum mean discrepancy, without bias.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x . y / d + 1)^3,                   (1)

is zero for equal distributions alone as far as their moments up to the third go; in the features of Inception-v3 it
is the KID. Its estimate from a sample of each leaves out the pairs of a point with itself,

    sum_(i /= j) k(x_i, x_j) / m (m - 1) + sum_(i /= j) k(y_i, y_j) / n (n - 1) - 2 mean_(i, j) k(x_i, y_j),   (2)

and is right on average at any number of samples: where the Frechet distance of few samples is too large, this one
scatters about the truth, below zero as well. The samples are dealt to B blocks, each block gives (2), and

    value = mean_b v_b,    error^2 = var_b v_b / B,                                                  (3)

for the blocks are independent.

References:
    Demystifying MMD GANs (Binkowski et al., 2018), section 4
    https://arxiv.org/abs/1801.01401
    A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6 and section 3.2 of blocks
    https://jmlr.org/papers/v13/gretton12a.html
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import generator
from reverie.evaluation.frechet import Features

Others = Float[Tensor, "_ e"]  # a second set's: that it has as many dimensions is told in words
LEAST = 5  # samples of a block


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance with its error.

    Arguments:
        value: The mean of the blocks' estimates.
        standard_error: Of that mean.
        blocks: How many blocks there were.
    """

    value: float
    standard_error: float
    blocks: int


def polynomial(x: Float[Tensor, "m d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """Return k(x_i, y_j) (M, N) of equation (1).

    Example:
        >>> polynomial(torch.ones(1, 2), torch.ones(1, 2))
        tensor([[8.]])
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(x: Features, y: Features) -> float:
    """Return the estimate (2) of MMD^2 from samples (M, D) and (N, D), two of each at least.

    Example:
        >>> squared_mmd(torch.zeros(2, 1), torch.ones(2, 1))  # 1 + 8 - 2
        7.0
    """
    x, y = x.double(), y.double()
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (polynomial(x, x), polynomial(y, y))]
    return float(within[0] + within[1] - 2 * polynomial(x, y).mean())


def kernel_distance(x: Features, y: Others, blocks: int = 10, seed: int = 0) -> KernelDistance:
    """Return the kernel distance of two sets of features with its standard error (3).

    Arguments:
        x: Features (M, D) of the one set.
        y: Features (N, D) of the other.
        blocks: Into how many blocks they are dealt, at least 2.
        seed: Of the dealing.

    Raises:
        UsageError: The features differ in their dimensions, or a block has fewer than 5 samples.
        NonFiniteError: A feature is NaN or infinite.

    Example:
        >>> rows = torch.arange(40.0)[:, None] / 40
        >>> abs(kernel_distance(rows, rows, blocks=2).value) < 0.1
        True
    """
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions have no distance")
    if blocks < 2 or min(len(x), len(y)) < LEAST * blocks:
        raise UsageError(
            f"{len(x)} and {len(y)} samples in {blocks} blocks; take at least 2 blocks, and {LEAST} samples for each"
        )
    dealt = [
        part[torch.from_numpy(generator(seed, "blocks", name).permutation(len(part)))].tensor_split(blocks)
        for name, part in (("x", x), ("y", y))
    ]
    values = torch.tensor([squared_mmd(a, b) for a, b in zip(*dealt, strict=True)], dtype=torch.float64)
    if not values.isfinite().all():
        raise NonFiniteError("a feature is NaN or infinite; look for it in the samples")
    return KernelDistance(float(values.mean()), float(values.std() / math.sqrt(blocks)), blocks)
