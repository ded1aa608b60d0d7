r"""Conditions bound to a denoiser, and classifier-free guidance.

    D_w = D_u + w (D_c - D_u),                                                                      (1)

with D_c the conditional and D_u the unconditional estimate. w = 0 is unconditional, w = 1 conditional
(no guidance), w > 1 guided. (The paper's own w is one less: (1 + w) eps_c - w eps_u.)

References:
    Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6
    https://arxiv.org/abs/2207.12598
"""

import math

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data, per_sample


class Conditioned(Denoiser):
    """A denoiser with its condition bound to it, row for row.

    Arguments:
        denoiser: The conditional denoiser.
        condition: Tensors of B rows by the network's keyword.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.condition = denoiser, denoiser.schedule, condition

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse_second(condition)
        return self.denoiser(x, t, self.condition)


class ClassifierFree(Denoiser):
    """Classifier-free guidance: both estimates in one call of the network.

    Arguments:
        denoiser: The conditional denoiser.
        condition: What is asked for, tensors of B rows.
        unconditional: What stands for nothing, or for what is not wanted, tensors of B rows.
        guidance: w of (1), one number or one per sample (B,).

    Raises:
        UsageError: A guidance that is not finite, or conditions that do not correspond.
    """

    def __init__(
        self, denoiser: Denoiser, condition: Condition, unconditional: Condition, guidance: float | Tensor
    ) -> None:
        super().__init__()
        if not math.isfinite(float(torch.as_tensor(guidance).sum())):
            raise UsageError(f"guidance is {guidance}; it must be a finite number (1 means none)")
        if set(condition) != set(unconditional):
            raise UsageError(f"the condition has {sorted(condition)}, its opposite {sorted(unconditional)}")
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.both = {name: torch.cat([value, unconditional[name]]) for name, value in condition.items()}
        self.guidance = torch.as_tensor(guidance, dtype=torch.float64)

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse_second(condition)
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), self.both)
        weight = per_sample(self.guidance.expand(len(x)), x)
        (x0, x0_u), (eps, eps_u) = both.x0.chunk(2), both.eps.chunk(2)
        fraction = None if both.fraction is None else both.fraction.chunk(2)[0]
        return Estimate(x0_u + weight * (x0 - x0_u), eps_u + weight * (eps - eps_u), fraction)


def refuse_second(condition: Condition | None) -> None:
    """Refuse a condition where one is bound already."""
    if condition is not None:
        raise UsageError("this denoiser has its condition bound already; give the condition when it is made")
