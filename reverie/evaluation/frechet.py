r"""The Frechet distance between two sets of features, each summed up as a Gaussian.

    d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)                       (1)

is the squared 2-Wasserstein distance from N(m_a, C_a) to N(m_b, C_b); in the features of Inception-v3 it
is the FID. With any factors C_a = A A^T and C_b = B B^T, the last trace is a sum of singular values,

    tr((C_a^1/2 C_b C_a^1/2)^1/2) = |A^T B|_*,                                                      (2)

so no root of a product of covariances is taken: nothing complex can appear, and equal Gaussians give zero
to rounding itself, where the root of a product would give the square root of rounding.

The distance of finite samples is too large, by c_a / n_a + c_b / n_b to first order, and c is larger for
worse models. Compare only distances taken at the same n_a and n_b, with n well above the number of
features (below it, a covariance is singular). `frechet_with_error` estimates the bias and the error.

References:
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017), eq. 6
    https://arxiv.org/abs/1706.08500

    The Frechet Distance between Multivariate Normal Distributions (Dowson & Landau, 1982), eq. 4
    https://doi.org/10.1016/0047-259X(82)90077-X

    Effectively Unbiased FID and Inception Score and Where to Find Them (Chong & Forsyth, 2020)
    https://arxiv.org/abs/1911.07023
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import generator

Features = Float[Tensor, "_ d"]  # sets of any two sizes may be compared

# A covariance computed in float64 has eigenvalues this far below zero, relative to its largest, by rounding alone.
ROUNDING = 1e-9


def frechet_distance(
    mean_a: Float[Tensor, " a"], cov_a: Float[Tensor, "a a"], mean_b: Float[Tensor, " b"], cov_b: Float[Tensor, "b b"]
) -> float:
    """Return the squared Frechet distance (1) between two Gaussians, computed in float64.

    Arguments:
        mean_a: Mean of the one (D,).
        cov_a: Covariance of the one (D, D), symmetric and positive semi-definite; it may be singular.
        mean_b: Mean of the other (D,).
        cov_b: Covariance of the other (D, D).

    Raises:
        UsageError: The shapes differ, or a covariance is not one.
        NonFiniteError: There is a NaN or an infinity.

    Example:
        >>> zero, one = torch.zeros(2), torch.eye(2)
        >>> round(frechet_distance(zero, one, zero + 3, 4 * one), 6)  # |m|^2 + d (2 - 1)^2 = 18 + 2
        20.0
    """
    if not mean_a.shape == mean_b.shape == cov_a.shape[:1] == cov_b.shape[:1]:
        raise UsageError(
            f"the two Gaussians have {len(mean_a)} and {len(mean_b)} dimensions (covariances {tuple(cov_a.shape)} "
            f"and {tuple(cov_b.shape)}); both must come from one feature space"
        )
    shift = (mean_a.double() - mean_b.double()).square().sum()
    spread = cov_a.double().trace() + cov_b.double().trace()
    overlap = torch.linalg.svdvals(_factor(cov_a, "a").T @ _factor(cov_b, "b")).sum()
    distance = float(shift + spread - 2 * overlap)
    if not math.isfinite(distance):
        raise NonFiniteError("a mean holds a NaN or an infinity; look for it in the features it was taken from")
    return max(distance, 0.0)  # below zero by rounding only


def _factor(cov: Float[Tensor, "d d"], name: str) -> Float[Tensor, "d d"]:
    """Return A with A A^T = cov, in float64."""
    cov = cov.double()
    if not cov.isfinite().all():
        raise NonFiniteError(f"covariance {name} holds a NaN or an infinity; look for it in the features")
    if not torch.allclose(cov, cov.T, rtol=0, atol=ROUNDING * float(cov.abs().max())):
        raise UsageError(f"covariance {name} is not symmetric; pass the covariance itself, not a factor of it")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -ROUNDING * values.abs().max():
        raise UsageError(f"covariance {name} has the eigenvalue {float(values[0]):.3g}; a covariance has none below 0")
    return vectors * values.clamp(min=0).sqrt()


# Moments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    r"""Count, mean and scatter of features that come in batches; those of two sets add up to their union's.

    m = m_a + (n_b / n) (m_b - m_a),    S = S_a + S_b + (n_a n_b / n) (m_b - m_a)(m_b - m_a)^T,     (3)

    with n = n_a + n_b and S the sum of outer products about the mean, so that no large sums cancel.

    Arguments:
        count: Number of feature vectors n.
        mean: Their mean (D,), in float64.
        scatter: Their scatter S (D, D), in float64.

    References:
        Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan, Golub & LeVeque, 1979)
        http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

    Example:
        >>> x = torch.arange(12.0).reshape(6, 2)
        >>> bool(torch.allclose((Moments.of(x[:1]) + Moments.of(x[1:])).covariance, x.double().T.cov()))
        True
    """

    count: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Return the moments of one batch of features (N, D), N at least 1.

        Raises:
            UsageError: There are no features.
            NonFiniteError: A feature is a NaN or an infinity; the message says of which sample.
        """
        if len(features) == 0:
            raise UsageError("there are no features to take the moments of; pass at least one sample")
        features = features.double()
        bad = (~features.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            raise NonFiniteError(f"features of {len(bad)} of {len(features)} samples are not finite, first {bad[0]}")
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @classmethod
    def over(cls, batches: Iterable[Features]) -> "Moments":
        """Return the moments of all batches (N_i, D) together, holding one at a time."""
        moments = map(cls.of, batches)
        first = next(moments, None)
        if first is None:
            raise UsageError("there are no features to take the moments of; pass at least one batch")
        return reduce(add, moments, first)

    def __add__(self, other: "Moments") -> "Moments":
        if self.mean.shape != other.mean.shape:
            raise UsageError(f"features of {len(self.mean)} and of {len(other.mean)} dimensions have no common moments")
        count = self.count + other.count
        delta = other.mean - self.mean
        outer = torch.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), self.scatter + other.scatter + outer)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance S / (n - 1)."""
        if self.count < 2:
            raise UsageError("the covariance of one sample is undefined; pass at least two")
        return self.scatter / (self.count - 1)


# Distances of samples ---------------------------------------------------------------------------


def frechet(features_a: Features, features_b: Features) -> float:
    """Return the squared Frechet distance (1) between two sets of features (N, D) and (M, D).

    Example:
        >>> x = torch.arange(8.0).reshape(4, 2)
        >>> round(frechet(x, x + 1), 6)
        2.0
    """
    return _distance(Moments.of(features_a), Moments.of(features_b))


@dataclass(frozen=True)
class Measured:
    """A distance with what is known of its error.

    Arguments:
        value: The squared Frechet distance of the samples as they are.
        standard_error: The jackknife's standard error of that value.
        bias: The jackknife's estimate of how much of the value is due to the samples being finite.
    """

    value: float
    standard_error: float
    bias: float

    @property
    def corrected(self) -> float:
        """The value less its bias: an estimate for samples without end, which can fall below zero."""
        return self.value - self.bias


def frechet_with_error(features_a: Features, features_b: Features, groups: int = 20, seed: int = 0) -> Measured:
    r"""Return the Frechet distance with a standard error and a bias, from a jackknife over groups of samples.

    Each set is split at random into G groups; with d_(g) the distance without group g of that set,

        error^2 = (G - 1) / G sum_g (d_(g) - d_mean)^2,    bias = (G - 1) (d_mean - d),             (4)

    and the squared errors and the biases of the two sets add up. The error holds the samples' own
    randomness, not that of the training run or of the feature space.

    Arguments:
        features_a: Features (N, D) of the one set, N at least 2 G.
        features_b: Features (M, D) of the other, M at least 2 G.
        groups: Number of groups G, at least 2.
        seed: Seed of the split into groups.

    Raises:
        UsageError: There are fewer than two samples for each group.

    References:
        The Jackknife, the Bootstrap and Other Resampling Plans (Efron, 1982), ch. 2 and 3
        https://doi.org/10.1137/1.9781611970319
    """
    if groups < 2 or min(len(features_a), len(features_b)) < 2 * groups:
        raise UsageError(
            f"{len(features_a)} and {len(features_b)} samples in {groups} groups; "
            "take at least 2 groups, and at least two samples for each of them"
        )
    all_a, all_b = Moments.of(features_a), Moments.of(features_b)
    value = _distance(all_a, all_b)
    variance = bias = 0.0
    for name, features, other in (("a", features_a, all_b), ("b", features_b, all_a)):
        without = torch.tensor([_distance(m, other) for m in _leave_one_out(features, groups, seed, name)])
        variance += (groups - 1) * float(without.var(correction=0))
        bias += (groups - 1) * (float(without.mean()) - value)
    return Measured(value, math.sqrt(variance), bias)


def _distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def _leave_one_out(features: Features, groups: int, seed: int, name: str) -> list[Moments]:
    """Return the moments of the features without each of the groups."""
    order = torch.from_numpy(generator(seed, "jackknife", name).permutation(len(features)))
    parts = [Moments.of(part) for part in features[order].tensor_split(groups)]
    return [reduce(add, parts[:g] + parts[g + 1 :]) for g in range(groups)]
