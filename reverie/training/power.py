r"""Averages of the weights whose length grows with the run, and any length of them after the run is over.

    ema_t <- beta_t ema_{t-1} + (1 - beta_t) w_t,    beta_t = (1 - 1/t)^(g + 1)                     (1)

gives the weights after update tau the share of a power function, integrated over (tau - 1, tau]:

    p_{g,t}(x) = (g + 1) x^g / t^(g + 1)    on [0, t].                                             (2)

The start has no share (beta_1 = 0), and the profile keeps its shape as the run goes on. Its length is its standard
deviation over t,

    sigma_rel = sqrt(g + 1) / ((g + 2) sqrt(g + 3)),                                               (3)

so that sigma_rel = 0.1 averages over about the last tenth or two of the run. From snapshots of two lengths, kept as
the run went on, any other is built: the combination of their profiles that is nearest to the one wanted,

    min_w |p - sum_i w_i p_i|^2:    A w = b,    A_ij = <p_i, p_j>,    b_i = <p_i, p>,               (4)
    <p_a, p_b> = (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (t_a / t_b)^g_b / t_b    for t_a <= t_b,     (5)

is the same combination of their weights.

References:
    Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2023), section 3 and appendix C
    https://arxiv.org/abs/2312.02696
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reverie.base.errors import UsageError

LONGEST = 12**-0.5  # of the plain mean, g = 0


class Profile(NamedTuple):
    """The power function (2) of an average: its exponent g, and the update t at which it was taken.

    Example:
        >>> Profile.of_length(0.1, 1000).exponent
        6.937...
    """

    exponent: float
    updates: float

    @classmethod
    def of_length(cls, sigma_rel: float, updates: float) -> "Profile":
        """Return the profile of a relative length after so many updates."""
        return cls(exponent_of(sigma_rel), updates)


def length_of(exponent: float) -> float:
    """Return the relative length sigma_rel of an exponent g: equation (3).

    Example:
        >>> round(length_of(6.94), 4), round(length_of(0), 4)
        (0.1, 0.2887)
    """
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent_of(sigma_rel: float) -> float:
    """Return the exponent g of a relative length: the root of the cubic that (3) is, squared.

    Raises:
        UsageError: The length is not above 0, or above that of the plain mean.

    Example:
        >>> round(exponent_of(0.05), 2), round(exponent_of(0.1), 2)
        (16.97, 6.94)
    """
    if not 0 < sigma_rel <= LONGEST + 1e-12:
        raise UsageError(
            f"the relative length of an average is {sigma_rel}; it must be above 0 and at most {LONGEST:.4f}, "
            "the plain mean's; 0.05 to 0.2 is usual"
        )
    square = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - square, 12 - square]).real.max()))


def inner_product(a: Profile, b: Profile) -> float:
    """Return the inner product of two profiles: equation (5).

    Example:
        >>> inner_product(Profile(0, 4), Profile(0, 5))  # 1/4 and 1/5 over a length of 4
        0.2
    """
    if a.updates > b.updates:
        a, b = b, a
    scale = (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1)
    return scale * (a.updates / b.updates) ** b.exponent / b.updates


class Combination(NamedTuple):
    """The shares of the snapshots, and how far the profile that they make is from the one wanted, relatively."""

    shares: list[float]
    error: float


def combine(snapshots: Sequence[Profile], wanted: Profile) -> Combination:
    """Return the shares of snapshots whose combination is nearest to a profile: equation (4).

    Arguments:
        snapshots: Their profiles, each of another length or time.
        wanted: The profile to be made.

    Raises:
        UsageError: There are no snapshots.

    Example:
        >>> combine([Profile(7, 100), Profile(17, 100)], Profile(7, 100)).error < 1e-6
        True
    """
    if not snapshots:
        raise UsageError("there are no snapshots to combine; train with --ema-lengths 0.1,0.05")
    # Profiles scaled to length 1, so that the system's condition is that of their directions alone.
    sizes = np.array([math.sqrt(inner_product(p, p)) for p in snapshots])
    size = math.sqrt(inner_product(wanted, wanted))
    gram = np.array([[inner_product(p, q) for q in snapshots] for p in snapshots]) / np.outer(sizes, sizes)
    target = np.array([inner_product(p, wanted) for p in snapshots]) / (sizes * size)
    shares = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    square = 1 - 2 * shares @ target + shares @ gram @ shares
    return Combination([float(share) for share in shares * size / sizes], math.sqrt(max(0.0, float(square))))
