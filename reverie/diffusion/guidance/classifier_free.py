r"""Conditions bound to a denoiser, and classifier-free guidance.

    D_w = D_u + w (D_c - D_u),                                                                      (1)

with D_c the conditional and D_u the unconditional estimate. w = 0 is unconditional, w = 1 conditional
(no guidance), w > 1 guided. (The paper's own w is one less: (1 + w) eps_c - w eps_u.)

References:
    Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6
    https://arxiv.org/abs/2207.12598
"""

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.guidance.base import Guided
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
        condition = refuse_second(self.condition, condition)
        check_rows(self.condition, len(x))
        return self.denoiser(x, t, {**self.condition, **condition})


class ClassifierFree(Guided):
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
        if not bool(torch.as_tensor(guidance).isfinite().all()):
            raise UsageError(f"guidance is {guidance}; it must be a finite number (1 means none)")
        if set(condition) != set(unconditional):
            raise UsageError(f"the condition has {sorted(condition)}, its opposite {sorted(unconditional)}")
        for name, value in condition.items():
            if value.shape != unconditional[name].shape:
                raise UsageError(
                    f"the condition's {name} is {tuple(value.shape)}, its opposite's {tuple(unconditional[name].shape)}"
                )
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.twice = {name: torch.cat([value, unconditional[name]]) for name, value in condition.items()}
        self.guidance = torch.as_tensor(guidance, dtype=torch.float64)

    def both(self, x: Data, t: Times, condition: Condition | None = None) -> tuple[Estimate, Estimate]:
        further = refuse_second(self.twice, condition)
        check_rows(self.twice, 2 * len(x))
        if self.guidance.ndim and len(self.guidance) != len(x):
            raise UsageError(
                f"guidance has {len(self.guidance)} numbers for {len(x)} samples; give one, or one for each"
            )
        told = {**self.twice, **{name: torch.cat([value, value]) for name, value in further.items()}}
        pair = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), told)
        weight = per_sample(self.guidance.expand(len(x)), x)
        (x0, x0_u), (eps, eps_u) = pair.x0.chunk(2), pair.eps.chunk(2)
        fraction = None if pair.fraction is None else pair.fraction.chunk(2)[0]
        # lerp is (1), and exact at w = 0 and w = 1.
        guided = Estimate(torch.lerp(x0_u, x0, weight), torch.lerp(eps_u, eps, weight), fraction)
        return Estimate(x0, eps, fraction), guided


def check_rows(condition: Condition, rows: int) -> None:
    """Refuse a batch that has not the condition's number of rows."""
    for name, value in condition.items():
        if len(value) != rows:
            raise UsageError(
                f"the bound condition's {name} has {len(value)} rows where the batch calls for {rows}; bind one row "
                "for each sample, and put FixedBatch around the network's denoiser, inside the guidance"
            )


def refuse_second(bound: Condition, condition: Condition | None) -> Condition:
    """Return what a sampler tells beside a bound condition (how far its step goes), having refused what is bound."""
    if condition is not None and (not condition or set(condition) & set(bound)):
        raise UsageError("this denoiser has its condition bound already; give the condition when it is made")
    return condition or {}
