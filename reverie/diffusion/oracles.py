r"""Oracles: denoisers in closed form, which every sampler, loss and bound is tested against.

For x_0 from sum_k w_k N(m_k, S_k) the noisy data is again a mixture, of N(alpha m_k, C_k) with
C_k = alpha^2 S_k + sigma^2 I, and the posterior mean is

    E[x_0 | x_t] = sum_k r_k (m_k + alpha S_k C_k^-1 (x_t - alpha m_k)),                             (1)

r_k being the components' responsibilities. The noise is E[eps | x_t] = sum_k r_k sigma C_k^-1 (x_t -
alpha m_k), with no division by sigma, so that both hold at either end.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import generator
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Schedule


def refuse(condition: Condition | None) -> None:
    """Refuse a condition: the oracles have none."""
    if condition:
        raise UsageError(f"an oracle takes no condition, and was given {sorted(condition)}")


class Mixture(Denoiser):
    """The exact denoiser of a Gaussian mixture with diagonal covariances, in any shape of data.

    Arguments:
        means: Component means (K, *D).
        stds: Standard deviations, (K,) for round components or (K, *D); 0 makes a point mass.
        weights: Component weights (K,), positive; they are normalised.
        schedule: The noise schedule.

    Raises:
        UsageError: The shapes do not agree, or a weight or a standard deviation has the wrong sign.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> one = Mixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), Flow())
        >>> one(torch.ones(1, 2), torch.tensor([0.5]).double()).x0
        tensor([[1., 1.]])
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Float[Tensor, "k *d"],
        stds: Float[Tensor, "k *e"],
        weights: Float[Tensor, " k"],
        schedule: Schedule,
    ) -> None:
        super().__init__()
        round_components = stds.shape == means.shape[:1]
        if (not round_components and stds.shape != means.shape) or weights.shape != means.shape[:1]:
            raise UsageError(
                f"means {tuple(means.shape)}, stds {tuple(stds.shape)} and weights {tuple(weights.shape)} do not "
                "describe one mixture; give (K, *D), (K,) or (K, *D), and (K,)"
            )
        if not bool((weights > 0).all()) or not bool((stds >= 0).all()):
            raise UsageError(
                f"a mixture's weights are positive and its stds at least 0, not {weights.min():g} and {stds.min():g}"
            )
        self.schedule = schedule
        self.shape = means.shape[1:]
        spread = per_sample(stds, means).expand_as(means) if round_components else stds
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", spread.flatten(1))
        self.register_buffer("weights", weights / weights.sum())

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse(condition)
        parts = self.parts(x, t)
        share = parts.responsibility[..., None]
        x0 = (share * (self.means.to(x) + parts.alpha * parts.spread * parts.pull)).sum(1)
        eps = (share * parts.sigma * parts.pull).sum(1)
        return Estimate(x0.reshape(x.shape), eps.reshape(x.shape))

    def parts(self, x: Data, t: Times) -> "Parts":
        """Return what (1) is made of, for each sample and component."""
        alpha, sigma = (per_sample(value, x.flatten(1))[:, None] for value in self.schedule.marginal(t))
        spread = self.stds.to(x).square()
        covariance = alpha.square() * spread + sigma.square()
        offset = x.flatten(1)[:, None] - alpha * self.means.to(x)
        pull = offset / covariance
        log_density = -0.5 * (offset * pull + covariance.log() + math.log(2 * math.pi)).sum(-1)
        joint = self.weights.to(x).log() + log_density
        return Parts(alpha, sigma, spread, pull, joint)

    def log_prob(self, x: Data, t: Times | None = None) -> Float[Tensor, " b"]:
        """Return ln p_t(x) in nats (B,); of the data itself where no time is given."""
        t = torch.zeros(len(x), dtype=torch.float64, device=x.device) if t is None else t
        return self.parts(x, t).joint.logsumexp(1)

    def score(self, x: Data, t: Times) -> Data:
        """Return grad ln p_t(x) (B, *D)."""
        parts = self.parts(x, t)
        return -(parts.responsibility[..., None] * parts.pull).sum(1).reshape(x.shape)

    def variance(self, x: Data, t: Times) -> Data:
        """Return the posterior's variance of each element of x_0 given x_t (B, *D)."""
        parts = self.parts(x, t)
        share = parts.responsibility[..., None]
        means = self.means.to(x) + parts.alpha * parts.spread * parts.pull
        within = parts.spread * parts.sigma.square() / (parts.alpha.square() * parts.spread + parts.sigma.square())
        mean = (share * means).sum(1, keepdim=True)
        return (share * (within + (means - mean).square())).sum(1).reshape(x.shape)

    def draw(self, count: int, seed: int = 0) -> Data:
        """Return samples of the data itself (count, *D), fixed by the seed."""
        random = generator(seed, "mixture")
        weights = self.weights.double().cpu()
        component = torch.from_numpy(random.choice(len(weights), size=count, p=(weights / weights.sum()).numpy()))
        z = torch.from_numpy(random.standard_normal((count, self.means.shape[1]))).to(self.means)
        component = component.to(self.means.device)
        return (self.means[component] + self.stds[component] * z).reshape(count, *self.shape)


@dataclass(frozen=True)
class Parts:
    """What equation (1) is made of, (B, K, D) or broadcastable to it.

    Arguments:
        alpha: The data's scale (B, 1, 1).
        sigma: The noise's scale (B, 1, 1).
        spread: The components' variances S_k (K, D).
        pull: C_k^-1 (x - alpha m_k).
        joint: ln(w_k N(x; alpha m_k, C_k)) (B, K).
    """

    alpha: Tensor
    sigma: Tensor
    spread: Tensor
    pull: Tensor
    joint: Tensor

    @property
    def responsibility(self) -> Tensor:
        """The components' responsibilities r_k (B, K)."""
        return self.joint.softmax(1)


class Gaussian(Denoiser):
    r"""The exact denoiser of one Gaussian with any covariance, in any shape of data.

    Its probability-flow map is linear and known: in the covariance's eigenbasis, with eigenvalues l,

        x_s - alpha_s m = sqrt((alpha_s^2 l + sigma_s^2) / (alpha_t^2 l + sigma_t^2)) (x_t - alpha_t m).    (2)

    Arguments:
        mean: The mean (*D).
        covariance: The covariance (N, N), N the number of elements of D.
        schedule: The noise schedule.
    """

    center: Tensor
    values: Tensor
    basis: Tensor

    def __init__(self, mean: Float[Tensor, "*d"], covariance: Float[Tensor, "n n"], schedule: Schedule) -> None:
        super().__init__()
        if covariance.shape != (mean.numel(), mean.numel()):
            raise UsageError(
                f"a mean of {mean.numel()} elements needs a covariance of that size squared, "
                f"not {tuple(covariance.shape)}"
            )
        self.schedule, self.shape = schedule, mean.shape
        values, basis = torch.linalg.eigh(covariance)
        self.register_buffer("center", mean.flatten())
        self.register_buffer("values", values.clamp(min=0))
        self.register_buffer("basis", basis)

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse(condition)
        alpha, sigma, pull = self.pull(x, t)
        x0 = self.center.to(x) + (alpha * self.values.to(x) * pull) @ self.basis.to(x).mT
        eps = (sigma * pull) @ self.basis.to(x).mT
        return Estimate(x0.reshape(x.shape), eps.reshape(x.shape))

    def pull(self, x: Data, t: Times) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha (B, 1), sigma (B, 1) and C^-1 (x - alpha m) in the eigenbasis (B, N)."""
        flat = x.flatten(1)
        alpha, sigma = (per_sample(value, flat) for value in self.schedule.marginal(t))
        offset = (flat - alpha * self.center.to(x)) @ self.basis.to(x)
        return alpha, sigma, offset / (alpha.square() * self.values.to(x) + sigma.square())

    def log_prob(self, x: Data, t: Times | None = None) -> Float[Tensor, " b"]:
        """Return ln p_t(x) in nats (B,); of the data itself where no time is given."""
        t = torch.zeros(len(x), dtype=torch.float64, device=x.device) if t is None else t
        alpha, sigma, pull = self.pull(x, t)
        variance = alpha.square() * self.values.to(x) + sigma.square()
        return -0.5 * (pull.square() * variance + variance.log() + math.log(2 * math.pi)).sum(1)

    def flow(self, x: Data, t: Times, s: Times) -> Data:
        """Return where the probability-flow ODE takes x_t (B, *D) at time s: equation (2)."""
        flat = x.flatten(1)
        alpha, sigma, pull = self.pull(x, t)
        alpha_s, sigma_s = (per_sample(value, flat) for value in self.schedule.marginal(s))
        before = alpha.square() * self.values.to(x) + sigma.square()
        after = alpha_s.square() * self.values.to(x) + sigma_s.square()
        moved = alpha_s * self.center.to(x) + (pull * (before * after).sqrt()) @ self.basis.to(x).mT
        return moved.reshape(x.shape)

    def draw(self, count: int, seed: int = 0) -> Data:
        """Return samples of the data itself (count, *D), fixed by the seed."""
        z = torch.from_numpy(generator(seed, "gaussian").standard_normal((count, len(self.values)))).to(self.center)
        return (self.center + (z * self.values.sqrt()) @ self.basis.mT).reshape(count, *self.shape)


class RoundMixture(Mixture):
    r"""The exact denoiser of a mixture of round components, by matrix products: quicker in many dimensions.

    With c_k = alpha^2 s_k^2 + sigma^2, (1) is a sum of means and a multiple of x,

        E[x_0 | x_t] = sum_k r_k (sigma^2 / c_k) m_k + (sum_k r_k alpha s_k^2 / c_k) x_t.               (3)

    Arguments:
        means: Component means (K, *D).
        stds: Standard deviations (K,).
        weights: Component weights (K,), positive.
        schedule: The noise schedule.
        numbers: How many numbers the data has, where these are but its coordinates in a subspace (`folded`).
    """

    def __init__(
        self,
        means: Float[Tensor, "k *d"],
        stds: Float[Tensor, " k"],
        weights: Float[Tensor, " k"],
        schedule: Schedule,
        numbers: int | None = None,
    ) -> None:
        super().__init__(means, stds, weights, schedule)
        self.register_buffer("round_stds", stds)
        self.numbers = self.means.shape[1] if numbers is None else numbers

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse(condition)
        flat, means = x.flatten(1), self.means.to(x)
        alpha, sigma = (per_sample(value, flat) for value in self.schedule.marginal(t))
        spread = self.get_buffer("round_stds").to(x).square()
        covariance = alpha.square() * spread + sigma.square()
        dots = flat @ means.mT
        distance = flat.square().sum(1, keepdim=True) - 2 * alpha * dots + alpha.square() * means.square().sum(1)
        density = -0.5 * (distance / covariance + self.numbers * covariance.log())
        share = (self.weights.to(x).log() + density).softmax(1)
        on_x = (share * alpha * spread / covariance).sum(1, keepdim=True)
        x0 = (share * sigma.square() / covariance) @ means + on_x * flat
        eps = (share * sigma / covariance).sum(1, keepdim=True) * flat
        eps = eps - (share * alpha * sigma / covariance) @ means
        return Estimate(x0.reshape(x.shape), eps.reshape(x.shape))

    def folded(self, x: Float[Tensor, "b *d"]) -> tuple["RoundMixture", Float[Tensor, "b e"]]:
        """Return this mixture and samples (B, *D) in at most K + 1 coordinates, in which each estimate and each
        distance is what it was.

        Estimates (3) are sums of x and the means, so that whatever a solver makes of x by sums stays in the space of
        the means and of the part of x that is normal to them, of which the length is all that counts. Each sample has
        an axis of its own for that part: distances between two samples are not kept, those between two states of one
        sample are.

        Example:
            >>> from reverie.diffusion.schedules import Flow
            >>> mixture, x = random_mixture(3072, 0, Flow()).folded(torch.ones(1, 3072).double())
            >>> x.shape, mixture.numbers
            (torch.Size([1, 11]), 3072)
        """
        flat = x.flatten(1)
        if self.means.shape[1] <= len(self.means) + 1:
            return RoundMixture(
                self.means, self.get_buffer("round_stds"), self.weights, self.schedule, self.numbers
            ), flat
        basis = torch.linalg.qr(self.means.mT).Q.to(x)
        inside = flat @ basis
        normal = (flat - inside @ basis.mT).norm(dim=1, keepdim=True)
        means = torch.cat([self.means.to(x) @ basis, torch.zeros(len(self.means), 1).to(x)], dim=1)
        stds, weights = self.get_buffer("round_stds").to(x), self.weights.to(x)
        return RoundMixture(means, stds, weights, self.schedule, self.numbers), torch.cat([inside, normal], dim=1)


def random_mixture(dimension: int, seed: int, schedule: Schedule, components: int = 10) -> RoundMixture:
    """Return a mixture drawn by its seed, in float64: means uniform in [-1, 1], round components of standard
    deviation 0.05 to 0.25, weights between 1 and 3 to each other; something like the range of images.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> random_mixture(2, seed=0, schedule=Flow()).means.shape
        torch.Size([10, 2])
    """
    random = generator(seed, "random mixture", dimension)
    means = torch.from_numpy(random.uniform(-1, 1, (components, dimension)))
    stds = torch.from_numpy(random.uniform(0.05, 0.25, components))
    return RoundMixture(means, stds, torch.from_numpy(random.uniform(1, 3, components)), schedule)
