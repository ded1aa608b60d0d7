r"""An estimate moved along a gradient: what guidance by a classifier and by a similarity have in common.

To draw from p(x) e^{s f} instead of p(x), the score becomes grad ln p_t(x) + s g with g = grad f, and with it

    x_0 + s sigma^2 / alpha g    and    eps - s sigma g,    which still make up x.                    (1)

f is a function of the noisy data, f(x_t, t), which takes one that was trained on noisy data; or of the estimate,
f(D(x_t)), for one that knows clean data alone: its gradient then goes through the denoiser as well. Where alpha is 0
the noisy data says nothing of x_0, f has no gradient, and the estimate stays as it is.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), eq. 14
    https://arxiv.org/abs/2011.13456
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 4.2, eq. 14
    https://arxiv.org/abs/2105.05233
"""

from collections.abc import Callable

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Schedule

Function = Callable[[Data, Times], Tensor]


class Steered(Denoiser):
    """A denoiser whose estimate is moved along the gradient of a function: equation (1).

    Arguments:
        denoiser: What is guided, its condition bound to it where it has one.
        function: f: from data (B, *D) and times (B,) to one number for each sample (B,), differentiable.
        scale: s, one number or one per sample (B,); 0 is no guidance.
        clean: f takes the estimate D(x_t) in place of the noisy x_t.

    Raises:
        UsageError: A scale that is not finite, or a function that gives something else than a number per sample.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import EDM
        >>> ball = Mixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), EDM())
        >>> steered = Steered(ball, lambda x0, t: x0[:, 0], scale=3.0, clean=True)
        >>> steered(torch.zeros(1, 2), torch.tensor([1 / 80]).double()).x0  # 3 times the posterior's variance, 1/2
        tensor([[1.5000, 0.0000]])
    """

    def __init__(
        self, denoiser: Denoiser, function: Function, scale: float | Tensor = 1.0, clean: bool = False
    ) -> None:
        super().__init__()
        if not bool(torch.as_tensor(scale).isfinite().all()):
            raise UsageError(f"the guidance's scale is {scale}; it must be a finite number (0 means none)")
        self.denoiser, self.schedule, self.function, self.clean = denoiser, denoiser.schedule, function, clean
        self.scale = torch.as_tensor(scale, dtype=torch.float64)

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        if self.scale.ndim and len(self.scale) != len(x):
            raise UsageError(f"the scale has {len(self.scale)} numbers for {len(x)} samples; give one, or one for each")
        if not bool(self.scale.any()):
            return self.denoiser(x, t, condition)
        # Samplers run without gradients; a tensor made in inference mode takes none until it is copied.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            estimate = self.denoiser(leaf, t, condition) if self.clean else None
            given = leaf if estimate is None else estimate.x0
            slope = gradient(self.function(given, t), leaf)
        estimate = self.denoiser(x, t, condition) if estimate is None else detached(estimate)
        return moved(estimate, slope, self.scale.expand(len(x)), t, self.schedule)


def gradient(values: Tensor, x: Data) -> Data:
    """Return the gradient (B, *D) of each sample's own value (B,) with respect to x."""
    if values.shape != x.shape[:1]:
        raise UsageError(f"what guides gives {tuple(values.shape)} for {len(x)} samples; one number for each is due")
    if not values.requires_grad:
        raise UsageError("what guides has no gradient with respect to the data; it must be differentiable")
    (slope,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if slope is None else slope


def detached(estimate: Estimate) -> Estimate:
    """Return an estimate without its gradients."""
    fraction = None if estimate.fraction is None else estimate.fraction.detach()
    return Estimate(estimate.x0.detach(), estimate.eps.detach(), fraction)


def moved(estimate: Estimate, slope: Data, scale: Times, t: Times, schedule: Schedule) -> Estimate:
    """Return the estimate moved along a slope (B, *D), scale (B,) times: equation (1)."""
    alpha, sigma = (per_sample(value, slope) for value in schedule.marginal(t))
    push = torch.where(alpha > 0, per_sample(scale.to(t.device), slope) * sigma * slope, 0.0)
    x0 = estimate.x0 + torch.where(alpha > 0, push * sigma / alpha, 0.0)
    return Estimate(x0, estimate.eps - push, estimate.fraction)
