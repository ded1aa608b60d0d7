r"""The forward process: closed form, step by step, and its posterior.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2),                                                       (1)
    q(x_t | x_s) = N(alpha_{t|s} x_s, sigma_{t|s}^2),    s < t,                                     (2)
        alpha_{t|s} = alpha_t / alpha_s,    sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2,
    q(x_s | x_t, x_0) = N(a x_0 + b x_t, tau^2),                                                    (3)
        a = alpha_s sigma_{t|s}^2 / sigma_t^2,  b = alpha_{t|s} sigma_s^2 / sigma_t^2,
        tau^2 = sigma_{t|s}^2 sigma_s^2 / sigma_t^2.

Variances add; standard deviations do not. With s one entry of a table before t, sigma_{t|s}^2 = beta_t.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 2, 4, 6 and 7
    https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), appendix A
    https://arxiv.org/abs/2107.00630
"""

from typing import NamedTuple

from torch import Tensor

from reverie.diffusion.denoisers import Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Marginal, Schedule


class Transition(NamedTuple):
    """q(x_t | x_s): its scale and its variance, one of each per sample (B,)."""

    alpha: Tensor
    variance: Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0): its weights on x_0 and on x_t and its variances, one of each per sample (B,).

    `small` is the posterior's own variance tau^2; `large` is the step's, sigma_{t|s}^2, an upper bound.
    """

    on_x0: Tensor
    on_x: Tensor
    small: Tensor
    large: Tensor

    def mean(self, x0: Data, x: Data) -> Data:
        """Return the posterior's mean (B, *D)."""
        return per_sample(self.on_x0, x) * x0 + per_sample(self.on_x, x) * x


def diffuse(schedule: Schedule, x0: Data, t: Times, eps: Data) -> Data:
    """Return x_t = alpha_t x_0 + sigma_t eps (B, *D): equation (1), what papers call q_sample.

    Example:
        >>> import torch; from reverie.diffusion.schedules import Flow
        >>> diffuse(Flow(), torch.ones(1, 2), torch.tensor([0.25]), torch.zeros(1, 2))
        tensor([[0.7500, 0.7500]])
    """
    alpha, sigma = schedule.marginal(t)
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


def transition(schedule: Schedule, s: Times, t: Times) -> Transition:
    """Return q(x_t | x_s) for times s <= t (B,): equation (2)."""
    return transition_between(schedule.marginal(s), schedule.marginal(t))


def transition_between(at_s: Marginal, at_t: Marginal) -> Transition:
    """Return q(x_t | x_s) where the marginals are known already."""
    alpha = at_t.alpha / at_s.alpha
    variance = at_t.sigma.square() - (alpha * at_s.sigma).square()
    return Transition(alpha, variance.clamp(min=0))


def diffuse_further(schedule: Schedule, x: Data, s: Times, t: Times, eps: Data) -> Data:
    """Return x_t (B, *D) from x_s: equation (2), one step of the forward process or many at once."""
    step = transition(schedule, s, t)
    return per_sample(step.alpha, x) * x + per_sample(step.variance.sqrt(), x) * eps


def posterior(schedule: Schedule, s: Times, t: Times) -> Posterior:
    """Return q(x_s | x_t, x_0) for times s < t (B,): equation (3)."""
    return posterior_between(schedule.marginal(s), schedule.marginal(t))


def posterior_between(at_s: Marginal, at_t: Marginal) -> Posterior:
    """Return q(x_s | x_t, x_0) where the marginals are known already."""
    step = transition_between(at_s, at_t)
    total, before = at_t.sigma.square(), at_s.sigma.square()
    return Posterior(
        on_x0=at_s.alpha * step.variance / total,
        on_x=step.alpha * before / total,
        small=step.variance * before / total,
        large=step.variance,
    )
