r"""k-diffusion's denoisers as ours, and ours as theirs.

Theirs is a function model(x', sigma') -> D of x' = x_0 + sigma' eps, where the data is not shrunk (variance
exploding): with alpha and sigma of any schedule,

    x' = x / alpha,    sigma' = sigma / alpha,    D = E[x_0 | x],    eps = (x - alpha D) / sigma.        (1)

References:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 2
    https://arxiv.org/abs/2206.00364
    k-diffusion
    https://github.com/crowsonkb/k-diffusion
"""

from collections.abc import Callable

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import EDM, Schedule

ROUNDING = 1e-5  # relative, of a noise level in float32


class KDiffusion(Denoiser):
    """A model of k-diffusion's seen as a denoiser. Made by `from_k_diffusion`.

    Arguments:
        model: Maps (x', sigma') of (1) to D.
        schedule: Which x the samplers walk.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule) -> None:
        super().__init__()
        if schedule.zero_terminal_snr:
            raise UsageError(
                "k-diffusion's noise level sigma / alpha is infinite at the end of this schedule (alpha = 0 at t = 1); "
                "use one that keeps some signal, such as edm, ve or vp"
            )
        self.model, self.schedule = model, schedule

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        alpha, sigma = self.schedule.marginal(t)
        a, b = per_sample(alpha, x), per_sample(sigma, x)
        x0 = self.model(x / a, (sigma / alpha).to(x), **(condition or {}))
        if x0.shape != x.shape:
            raise UsageError(f"the model gives {tuple(x0.shape)} for noisy data {tuple(x.shape)}; they must agree")
        x0 = x0.to(x)
        return Estimate(x0, (x - a * x0) / b)


def from_k_diffusion(model: Callable[..., Tensor], schedule: Schedule | None = None) -> KDiffusion:
    """Return a denoiser of a k-diffusion model, for any sampler here.

    Arguments:
        model: Maps (x' (B, *D), sigma' (B,), **condition) to the estimate of the clean data (B, *D).
        schedule: Which x the samplers walk, any that keeps some signal; EDM's (alpha = 1, sigma up to 80) if None.

    Raises:
        UsageError: The schedule ends at alpha = 0; or, when it is called, the model's output has another shape than x.

    Example:
        >>> denoiser = from_k_diffusion(lambda x, sigma: x / (1 + sigma[:, None] ** 2))  # of N(0, 1)
        >>> denoiser(torch.ones(1, 1), torch.tensor([1 / 80]).double()).eps
        tensor([[0.5000]])
    """
    return KDiffusion(model, EDM() if schedule is None else schedule)


def to_k_diffusion(denoiser: Denoiser) -> Callable[..., Tensor]:
    """Return a denoiser as a function model(x', sigma', **condition) -> D, for k-diffusion's samplers.

    Arguments:
        denoiser: Any. Noise levels are those of its schedule, above 0 and at most sigma / alpha at t = 1.

    Returns:
        The function; given a sigma' (B,), or one for all, that the schedule does not reach, it raises UsageError.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import VP
        >>> model = to_k_diffusion(Mixture(torch.zeros(1, 1), torch.ones(1), torch.ones(1), VP()))
        >>> model(torch.ones(1, 1), torch.ones(1))
        tensor([[0.5000]])
    """
    schedule = denoiser.schedule
    most = (-schedule.log_snr(torch.ones(1, dtype=torch.float64)) / 2).exp().item()

    def model(x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        if not bool(((level > 0) & (level <= most * (1 + ROUNDING))).all()):
            raise UsageError(f"sigma is {level.tolist()}; on this schedule it must lie in (0, {most:g}]")
        t = schedule.time(-2 * level.log()).clamp(max=1)
        return denoiser(per_sample(schedule.alpha(t), x) * x, t, condition or None).x0

    return model
