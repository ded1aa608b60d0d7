r"""Is each sample like the data, and is all of the data there? Precision and recall, density and coverage.

With r_k(x) the distance from x to the k-th nearest other point of its own set, the balls B(x_i, r_k(x_i)) about the N
real points stand for where the data is, and those about the M samples y_j for where the samples are:

    precision = 1/M sum_j 1[y_j in any B(x_i, r_k(x_i))]                                             (1)
    recall    = 1/N sum_i 1[x_i in any B(y_j, r_k(y_j))]                                             (2)
    density   = 1/(k M) sum_j sum_i 1[y_j in B(x_i, r_k(x_i))]                                       (3)
    coverage  = 1/N sum_i 1[any y_j in B(x_i, r_k(x_i))]                                             (4)

Balls are open. One real point far from all others makes a large ball, which counts for precision and little for
density; samples never make balls of their own for density and coverage. All four depend on both numbers of points,
and coverage of equal distributions is 1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)) on average, not 1.

References:
    Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019), eq. 1 and 2
    https://arxiv.org/abs/1904.06991
    Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), eq. 3, 4 and 9
    https://arxiv.org/abs/2002.09797
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.evaluation.frechet import Features
from reverie.evaluation.kernel import Others
from reverie.evaluation.neighbours import CHUNK, squared_distances

Pair = tuple[float, float]


@dataclass(frozen=True)
class Manifold:
    """The four, each with its standard error over the points that it is a mean of, the other set's taken as it is.

    Arguments:
        precision: (1), over the samples.
        recall: (2), over the real points.
        density: (3), over the samples.
        coverage: (4), over the real points.
        k: Which neighbour makes the radius.
    """

    precision: Pair
    recall: Pair
    density: Pair
    coverage: Pair
    k: int


def squared_radii(points: Features, k: int) -> Float[Tensor, " n"]:
    """Return the squared distance (N,) of each point (N, D) to its k-th nearest other.

    Raises:
        UsageError: There are not more than k points.

    Example:
        >>> squared_radii(torch.tensor([[0.0], [1.0], [3.0]]), 1).tolist()
        [1.0, 1.0, 4.0]
    """
    if not 1 <= k < len(points):
        raise UsageError(f"the {k}th neighbour of each of {len(points)} points: k must be at least 1 and below that")
    found, start = [], 0
    for part in points.split(max(1, CHUNK // len(points))):
        between = squared_distances(part, points)
        between[torch.arange(len(part)), start + torch.arange(len(part))] = 0  # a point and itself: 0, not rounding
        found.append(between.kthvalue(k + 1, 1).values)
        start += len(part)
    return torch.cat(found)


def manifold(real: Features, samples: Others, k: int = 5) -> Manifold:
    """Return precision, recall, density and coverage of samples (M, D) for real points (N, D).

    Arguments:
        real: Features of the data.
        samples: Features of what was generated.
        k: Which neighbour makes a ball's radius.

    Raises:
        UsageError: There are not more than k of both, or their dimensions differ.

    Example:
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> manifold(square, square + 100, k=1).precision[0], manifold(square, square + 0.1, k=1).coverage[0]
        (0.0, 1.0)
    """
    if real.shape[1] != samples.shape[1]:
        raise UsageError(f"features of {real.shape[1]} and of {samples.shape[1]} dimensions can't be compared")
    centre = real.double().mean(0)  # distances from differences of smaller numbers round less
    real, samples = real.double() - centre, samples.double() - centre
    about_real, about_samples = squared_radii(real, k), squared_radii(samples, k)
    counts, found = [], torch.zeros(len(real), dtype=torch.bool)
    recalled: Bool[Tensor, " n"] = torch.zeros(len(real), dtype=torch.bool)
    rows = max(1, CHUNK // len(real))
    for part, radius in zip(samples.split(rows), about_samples.split(rows), strict=True):
        between = squared_distances(part, real)  # (b, N)
        within = between < about_real
        counts.append(within.sum(1))
        found |= within.any(0)
        recalled |= (between < radius[:, None]).any(0)
    count = torch.cat(counts).double()
    return Manifold(
        mean((count > 0).double()), mean(recalled.double()), mean(count / k), mean(found.double()), k
    )  # fmt: skip


def mean(values: Float[Tensor, " n"]) -> Pair:
    """Return the mean of values (N,) and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
