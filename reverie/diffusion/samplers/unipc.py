r"""UniPC: a predictor, and a corrector that costs no evaluation.

The estimate D at the predicted x_t is needed for the next step anyway; before that step is taken, it also
corrects x_t itself. Predictor and corrector are both (1) of exponential.py,

    predictor of order p    through the last p estimates,                                            (1)
    corrector of order p    through those of the step before and the new one, order p + 1,           (2)

with exact weights but for the two that have a slope only (the predictor of order 2, the corrector of order
1), whose slope the paper weighs by B / 2, B(h) = 1 - e^-h or h. The last sample has nothing after it to be
corrected by.

References:
    UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao et al., 2023)
    https://arxiv.org/abs/2302.04867
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.levels import levels, weighted
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, State, Step, ask
from reverie.diffusion.samplers.dpmpp import linear_terms
from reverie.diffusion.samplers.exponential import Rule, step_weights
from reverie.diffusion.samplers.history import History, orders
from reverie.diffusion.schedules import Schedule

MANY = 1 << 62  # steps: in every run the order falls towards the end


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC, one evaluation a step.

    Arguments:
        order: The predictor's order, 1 to 3; the corrector's is one more.
        rule: B(h) of the slopes: half, 1 - e^-h (B_2 of the paper); half-h, h (B_1); exact, the integral's weight.
        corrector: Whether to correct.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> UniPC(order=3).stochastic
        False
    """

    order: int = 3
    rule: Rule = "half"
    corrector: bool = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UsageError(f"order is {self.order}; it must be 1, 2 or 3")
        if self.rule not in ("half", "half-h", "exact"):
            raise UsageError(f"rule is {self.rule!r}; it must be half, half-h or exact")

    def remember(self, x: Data) -> dict[str, Tensor]:
        memory = History.empty(x, self.order)
        if self.corrector:
            memory |= {name: torch.zeros(len(x), dtype=torch.float64) for name in ("t_before", "order")}
            memory["x_before"] = torch.zeros_like(x)
        return memory

    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        x0 = ask(denoiser, state.x, state.t).x0
        past = History.of(state, self.order)
        x = self.correct(denoiser.schedule, state, step, x0, past) if self.corrector else state.x
        due = orders(self.order, step, fall_below=MANY)
        weights = [
            step_weights(a.lam, b.lam, nodes, 0.0, self.rule)
            for a, b, nodes in zip(step.here, step.there, past.nodes(due), strict=True)
        ]
        moved = weighted(linear_terms(step, weights, [x0, *past.values], x))
        memory = past.push(x0, step.here)
        if self.corrector:
            memory |= {"x_before": x, "t_before": state.t, "order": torch.tensor(due, dtype=torch.float64)}
        return replace(state, x=moved, x0=x0, memory=memory)

    def correct(self, schedule: Schedule, state: State, step: Step, x0: Tensor, past: History) -> Data:
        """Return x_t, made anew from the step before with the new estimate among its nodes."""
        fresh = [k == 0 for k in step.k]
        if all(fresh):
            return state.x
        since = zip(state.memory["t_before"].tolist(), step.here, fresh, strict=True)
        before = levels(schedule, [a.t if new else t for t, a, new in since])
        weights = []
        for row, (a, b, order) in enumerate(zip(before, step.here, state.memory["order"].tolist(), strict=True)):
            if fresh[row]:
                weights.append((0.0,) * (self.order + 1))
                continue
            older = tuple(lam[row] for lam in past.lam[1 : int(order)])
            first, new, *rest = step_weights(a.lam, b.lam, (b.lam, *older), 0.0, self.rule)
            weights.append((first, *rest, *[0.0] * (self.order - 1 - len(rest)), new))
        again = replace(step, here=before, there=step.here)
        terms = linear_terms(again, weights, [*past.values, x0], state.memory["x_before"])
        corrected = weighted(terms)
        if not any(fresh):
            return corrected
        mask = torch.tensor(fresh, device=corrected.device).reshape(-1, *[1] * (corrected.ndim - 1))
        return torch.where(mask, state.x, corrected)
