r"""The variational bound on the likelihood, in bits/dim, with its three terms.

    -log p(x_0) <= KL(q(x_1 | x_0) | N(0, I))                                    prior                (1)
                 + sum_(t > first) KL(q(x_s | x_t, x_0) | p(x_s | x_t))          steps                (2)
                 - log p(x_0 | x_first)                                          decoder              (3)

Data of 8 bits has a discretised Gaussian for its decoder: the mass between the edges of each of 256
levels, the outermost reaching to infinity. Continuous data has the Gaussian's density.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5 and 13
    https://arxiv.org/abs/2006.11239
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), section 3
    https://arxiv.org/abs/2102.09672
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.process import Posterior, diffuse, posterior
from reverie.diffusion.schedules import Schedule, Table

Variance = Literal["small", "large", "learned"]


class Bound(NamedTuple):
    """The bound's terms for each sample (B,), in bits/dim."""

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound (B,), in bits/dim: an upper bound on -log2 p(x_0) / dimensions."""
        return self.prior + self.steps + self.decoder


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Return KL(N(mean_1, variance_1) | N(mean_2, variance_2)) elementwise, in nats.

    Example:
        >>> gaussian_kl(*torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor(0.5000)
    """
    gap = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(gap) - gap + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def gaussian_log_mass(x: Data, mean: Data, log_variance: Tensor, levels: int | None) -> Data:
    """Return ln p(x) elementwise (B, *D): a Gaussian's density, or its mass on x's level in [-1, 1].

    Arguments:
        x: The data; with levels, multiples of 2 / (levels - 1) from -1.
        mean: The Gaussian's mean.
        log_variance: The logarithm of its variance.
        levels: How many levels the data has, or None for a density.
    """
    std = (log_variance / 2).exp()
    if levels is None:
        return -0.5 * (((x - mean) / std).square() + log_variance + math.log(2 * math.pi))
    half = 1 / (levels - 1)
    upper = torch.where(x > 1 - half, torch.inf, (x + half - mean) / std)
    lower = torch.where(x < -1 + half, -torch.inf, (x - half - mean) / std)
    return log_normal_mass(lower, upper)


def log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Return ln(Phi(upper) - Phi(lower)), sound in both tails."""
    # By symmetry the interval is moved to the left, where ln Phi does not round to 0.
    flip = lower + upper > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    gap = (log_lower - log_upper).clamp(max=-1e-12)
    return log_upper + torch.log(-torch.expm1(gap))


def log_small(q: Posterior, first: Tensor, like: Data) -> Tensor:
    """Return ln small, broadcastable to (B, *D); at the first time, where it is ln 0, ln first stands for it."""
    return per_sample(torch.where(q.small > 0, q.small, first.to(q.small)).log(), like)


def log_variances(q: Posterior, estimate: Estimate, variance: Variance, floor: Tensor) -> Tensor:
    """Return the model's ln variance, broadcastable to (B, *D); at the first time, where the small one is 0,
    the floor stands for it."""
    small, large = log_small(q, floor, estimate.x0), per_sample(q.large.log(), estimate.x0)
    if variance != "learned":
        return (small if variance == "small" else large).expand_as(estimate.x0)
    if estimate.fraction is None:
        raise UsageError("variance is 'learned', but this model learned none; use small or large")
    return estimate.fraction * large + (1 - estimate.fraction) * small


def term(
    schedule: Table, estimate: Estimate, x0: Data, x: Data, t: Times, variance: Variance, levels: int | None
) -> Float[Tensor, " b"]:
    """Return the bound's term at each sample's timestep (B,), in bits/dim: (3) at the first, (2) elsewhere.

    Arguments:
        schedule: The table; times are its own.
        estimate: The model's estimate at x.
        x0: Clean data (B, *D).
        x: Noisy data (B, *D) at times t.
        t: Times (B,), entries of the table.
        variance: Which variance p(x_s | x_t) has.
        levels: The data's levels, or None.
    """
    s = schedule.time_of_timestep((schedule.timestep(t) - 1).round())
    q = posterior(schedule, s, t)
    mean, guess = q.mean(x0, x), q.mean(estimate.x0, x)
    first = first_small(schedule)
    log_variance = log_variances(q, estimate, variance, first)
    kl = gaussian_kl(mean, log_small(q, first, x), guess, log_variance)
    decoder = -gaussian_log_mass(x0, guess, log_variance, levels)
    nats = torch.where(per_sample(s, x) > 0, kl, decoder)
    return nats.flatten(1).mean(1) / math.log(2)


def check_options(variance: str, levels: int | None) -> None:
    """Refuse a variance or a number of levels that there is not."""
    if variance not in ("small", "large", "learned"):
        raise UsageError(f"variance is {variance!r}; it must be small, large or learned")
    if levels is not None and levels < 2:
        raise UsageError(f"levels is {levels}; it must be at least 2, or None for continuous data")


def first_small(schedule: Table) -> Tensor:
    """Return the posterior's variance at the second timestep, which stands for the first's, 0."""
    s, t = schedule.time_of_timestep(torch.tensor([[0], [1]]))
    return posterior(schedule, s, t).small[0]


def prior_term(schedule: Schedule, x0: Data) -> Float[Tensor, " b"]:
    """Return KL(q(x_1 | x_0) | N(0, prior^2)) (B,), in bits/dim: term (1)."""
    one = torch.ones(len(x0), dtype=torch.float64, device=x0.device)
    mean = per_sample(schedule.alpha(one), x0) * x0
    log_variance = per_sample(schedule.variance(one).log(), x0)
    prior = 2 * per_sample(schedule.prior_std(one).log(), x0)
    kl = gaussian_kl(mean, log_variance, torch.zeros_like(mean), prior)
    return kl.flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def bound(
    denoiser: Denoiser,
    x0: Data,
    noise: Noise,
    condition: Condition | None = None,
    variance: Variance = "small",
    levels: int | None = 256,
) -> Bound:
    """Return the variational bound of each sample, every timestep of the table evaluated once.

    Arguments:
        denoiser: The model, on a table.
        x0: Clean data (B, *D), in [-1, 1] where it has levels.
        noise: The noise of each sample; its draws k = 1 .. T are used.
        condition: The samples' condition.
        variance: Which variance the model's steps have.
        levels: 256 for 8-bit data, None for continuous data.

    Raises:
        UsageError: The schedule is no table, or there is no such variance or number of levels.
    """
    check_options(variance, levels)
    schedule = denoiser.schedule
    if not isinstance(schedule, Table):
        raise UsageError("the variational bound needs a schedule that is a table")
    terms = []
    for i in range(schedule.timesteps):
        t = schedule.time_of_timestep(torch.full((len(x0),), i, device=x0.device))
        x = diffuse(schedule, x0, t, noise.like(x0, [i + 1] * len(x0)))
        terms.append(term(schedule, denoiser(x, t, condition), x0, x, t, variance, levels))
    return Bound(prior_term(schedule, x0), torch.stack(terms[1:]).sum(0), terms[0])
