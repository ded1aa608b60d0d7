r"""Perturbed-attention guidance: a model guided by itself with its self-attention broken.

    D_s = D + s (D - D_p),                                                                          (1)

with D_p the same network, in which each pixel of chosen layers sees itself alone: the identity in place of the map of
attention. What it then draws has the look of the data and lost its structure, and away from that is where guidance
leads: without a class, a prompt or a second model. s = 0 is no guidance. Beside classifier-free guidance D in the
bracket is the estimate for what is asked for, and the two differences are added.

References:
    Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance (Ahn et al., 2024), section 4
    https://arxiv.org/abs/2403.17377
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.guidance.base import Guided, both
from reverie.diffusion.predictions import Data


class Perturbed(Denoiser):
    """Another denoiser, each call of which is made within a context that changes it.

    Arguments:
        denoiser: The denoiser.
        context: Makes the context of a call, which leaves everything as it was.
    """

    def __init__(self, denoiser: Denoiser, context: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.context = denoiser, denoiser.schedule, context

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        with self.context():
            return self.denoiser(x, t, condition)


class PerturbedGuided(Guided):
    """A denoiser guided away from a perturbed one: equation (1).

    Arguments:
        denoiser: D, its condition bound to it where it has one; it may be guided already.
        perturbed: D_p, with the same condition.
        scale: s.

    Raises:
        UsageError: A scale that is not finite.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> good, bad = (Mixture(torch.full((1, 2), m), torch.zeros(1), torch.ones(1), Flow()) for m in (1.0, 0.5))
        >>> PerturbedGuided(good, bad, scale=3.0)(torch.zeros(1, 2), torch.tensor([0.5]).double()).x0
        tensor([[2.5000, 2.5000]])
    """

    def __init__(self, denoiser: Denoiser, perturbed: Denoiser, scale: float) -> None:
        super().__init__()
        if not bool(torch.as_tensor(scale).isfinite()):
            raise UsageError(f"the guidance's scale is {scale}; it must be a finite number (0 means none)")
        self.denoiser, self.perturbed, self.schedule, self.scale = denoiser, perturbed, denoiser.schedule, scale

    def both(self, x: Data, t: Times, condition: Condition | None = None) -> tuple[Estimate, Estimate]:
        asked, guided = both(self.denoiser, x, t, condition)
        if self.scale == 0:
            return asked, guided
        away = self.perturbed(x, t, condition)
        x0 = guided.x0 + self.scale * (asked.x0 - away.x0)
        eps = guided.eps + self.scale * (asked.eps - away.eps)
        return asked, Estimate(x0, eps, guided.fraction)
