r"""Several mixtures of round components as one denoiser: quick to fit solvers to, and to judge them on.

Rows of a batch belong to the mixtures in equal parts, the first mixture's first. With l_k the logarithm of component
k's share before it is normalised, r_k the share, the estimate (oracles.py, 3) has the derivative

    dD/dx = sum_k r_k (alpha s_k^2 / c_k) I + (sigma^2 / alpha) Cov_r(grad l_k),                    (1)

grad l_k = -(x - alpha m_k) / c_k, so that a whole bundle of directions costs little more than the estimate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.oracles import RoundMixture, random_mixture, refuse
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.starts import Circles, circles


class Shares(NamedTuple):
    """What an estimate is made of: data (M, S, D), alpha and sigma (M, S or 1, 1), 1 / c_k and r_k (M, S, K)."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    precision: Tensor
    share: Tensor


class MixtureStack(Denoiser):
    """Mixtures of as many components and coordinates, on one schedule; each has the same number of a batch's rows.

    Arguments:
        mixtures: The mixtures, at least one.

    Raises:
        UsageError: They differ in components, coordinates or numbers; or a batch can't be shared out evenly.

    Example:
        >>> from reverie.diffusion.oracles import random_mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> stack = MixtureStack([random_mixture(2, seed, Flow()) for seed in (0, 1)])
        >>> stack(torch.ones(6, 2).double(), torch.full((6,), 0.5).double()).x0.shape
        torch.Size([6, 2])
    """

    def __init__(self, mixtures: Sequence[RoundMixture]) -> None:
        super().__init__()
        if len({(mixture.means.shape, mixture.numbers) for mixture in mixtures}) != 1:
            raise UsageError("a stack is of mixtures with as many components, coordinates and numbers as each other")
        self.schedule, self.numbers = mixtures[0].schedule, mixtures[0].numbers
        self.register_buffer("means", torch.stack([mixture.means for mixture in mixtures]))
        self.register_buffer("spread", torch.stack([m.get_buffer("round_stds") for m in mixtures]).square()[:, None])
        self.register_buffer("log_weights", torch.stack([mixture.weights for mixture in mixtures]).log()[:, None])

    def forward(self, x: Float[Tensor, "b d"], t: Times, condition: Condition | None = None) -> Estimate:
        refuse(condition)
        known, means = self.shares(x, t), self.get_buffer("means")
        scaled = known.share * known.precision
        pull = torch.bmm(scaled, means)
        on_x = known.alpha * (scaled * self.get_buffer("spread")).sum(2, keepdim=True)
        x0 = known.sigma.square() * pull + on_x * known.x
        eps = known.sigma * (scaled.sum(2, keepdim=True) * known.x - known.alpha * pull)
        return Estimate(x0.reshape(x.shape), eps.reshape(x.shape))

    def along(self, x: Float[Tensor, "b d"], t: Times, moves: Float[Tensor, "b d p"]) -> Float[Tensor, "b d p"]:
        """Return how the estimate changes as x moves along each of some directions (B, D, P): equation (1)."""
        known, means = self.shares(x, t), self.get_buffer("means")
        share, scaled = known.share, known.share * known.precision
        on_x = known.alpha * (scaled * self.get_buffer("spread")).sum(2, keepdim=True)
        slopes = (known.alpha[..., None] * means[:, None] - known.x[:, :, None]) * known.precision[..., None]
        slopes = (slopes - (share[..., None] * slopes).sum(2, keepdim=True)) * share.sqrt()[..., None]
        rows = slopes.reshape(-1, *slopes.shape[2:])
        factor = (known.sigma.square() / known.alpha).expand(*known.x.shape[:2], 1).reshape(-1, 1, 1)
        jacobian = factor * torch.bmm(rows.mT, rows)
        jacobian.diagonal(dim1=1, dim2=2).add_(on_x.reshape(-1, 1))
        return torch.bmm(jacobian, moves)

    def shares(self, x: Tensor, t: Times) -> Shares:
        """Return what an estimate is made of."""
        means = self.get_buffer("means")
        if len(x) % len(means):
            raise UsageError(f"a batch of {len(x)} can't be shared out to {len(means)} mixtures evenly")
        # One time for all is common, and then worked out once.
        alpha, sigma = self.schedule.marginal(t[:1] if t.stride() == (0,) else t)
        alpha, sigma = (v if len(v) == 1 else v.reshape(len(means), -1) for v in (alpha, sigma))
        alpha, sigma = (v.reshape(-1, *v.shape[1:], 1) if v.ndim == 2 else v.reshape(1, 1, 1) for v in (alpha, sigma))
        rows = x.reshape(len(means), -1, x.shape[1])
        precision = 1 / (alpha.square() * self.get_buffer("spread") + sigma.square())
        distance = rows.square().sum(2, keepdim=True) - 2 * alpha * torch.bmm(rows, means.mT)
        distance = distance + alpha.square() * means.square().sum(2)[:, None]
        density = -0.5 * (distance * precision - self.numbers * precision.log())
        return Shares(rows, alpha, sigma, precision, (self.get_buffer("log_weights") + density).softmax(2))


def random_stack(
    dimension: int, seeds: Sequence[int], count: int, schedule: Schedule, purpose: str
) -> tuple[MixtureStack, Float[Tensor, "b d"]]:
    """Return random mixtures as one, and for each as many starts at t = 1, all folded (RoundMixture.folded).

    Arguments:
        dimension: The dimension.
        seeds: The mixtures' seeds.
        count: Starts of each.
        schedule: Their schedule.
        purpose: What the starts are drawn for.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> stack, x = random_stack(3072, (0, 1), 5, Flow(), "example")
        >>> x.shape
        torch.Size([10, 11])
    """
    scale = float(schedule.prior_std(torch.ones(1, dtype=torch.float64)))
    drawn = [scale * normal((count, dimension), seed, purpose).double() for seed in seeds]
    folded = [random_mixture(dimension, seed, schedule).folded(x) for seed, x in zip(seeds, drawn, strict=True)]
    return MixtureStack([mixture for mixture, _ in folded]), torch.cat([x for _, x in folded])


def random_circles(dimension: int, seeds: Sequence[int], count: int, schedule: Schedule, purpose: str) -> Circles:
    """Return as many circles of starts for each of random_stack's mixtures, all folded (starts.py, 2)."""
    scale = float(schedule.prior_std(torch.ones(1, dtype=torch.float64)))
    drawn = [[scale * normal((count, dimension), seed, f"{purpose}, {end}").double() for seed in seeds] for end in "xy"]
    mixtures = [random_mixture(dimension, seed, schedule) for seed in seeds]
    unfolded = circles(*(torch.cat(noises) for noises in drawn))

    def folded(angle: Float[Tensor, " m"]) -> Float[Tensor, "m d"]:
        rows = unfolded(angle).split(count)
        return torch.cat([mixture.folded(x)[1] for mixture, x in zip(mixtures, rows, strict=True)])

    return folded
