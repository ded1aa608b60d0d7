r"""Latent consistency models: distillation of a guided teacher, the guidance an input of the student.

The teacher's ODE is that of classifier-free guidance (guidance/classifier_free.py, eq. 1), whose w is drawn anew for
each sample, and told to the student:

    L = d(f(x_t, t, c, w), stop f(x_r, r, c, w)),    x_r = a step of the ODE of D_u + w (D_c - D_u),   (1)
    w ~ U[low, high].                                                                                 (2)

So that the student needs one evaluation where the teacher needs two for each of its steps. It is weighed as in
consistency.py, eq. 1. Nothing in it is particular to latents, of which the paper's pictures are made.

References:
    Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference (Luo et al., 2023), eq. 12-14
    https://arxiv.org/abs/2310.04378
    On Distillation of Guided Diffusion Models (Meng et al., 2023), section 3.1: the guidance as an input
    https://arxiv.org/abs/2210.03142
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.few_step.common import HUBER, Solver, gap, ode_step
from reverie.diffusion.few_step.consistency import Consistency
from reverie.diffusion.guidance.classifier_free import ClassifierFree
from reverie.diffusion.predictions import Data
from reverie.diffusion.process import diffuse


class LatentConsistency(Consistency):
    """The loss (1).

    Arguments:
        teacher: The conditional denoiser.
        nothing: What stands for no condition, tensors of one row by the network's keyword.
        low: The least w.
        high: The largest.
        last: Intervals of the levels.
        solver: The step of the guided ODE: euler, which is DDIM, or heun.
        width: c of the distance (common.py, eq. 2).
        target: The network that makes the target; None for the one that is trained.

    Raises:
        UsageError: The range of w is none; on a call, there is no condition.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> LatentConsistency(point, {"label": torch.tensor([10])}).count
        51
    """

    draws = True

    def __init__(
        self,
        teacher: Denoiser,
        nothing: Condition,
        low: float = 1.0,
        high: float = 8.0,
        last: int = 50,
        solver: Solver = "euler",
        width: float = HUBER,
        target: Denoiser | None = None,
    ) -> None:
        super().__init__(1, teacher, last=last, solver=solver, width=width, target=target)
        if not 0 <= low <= high < float("inf"):
            raise UsageError(f"w is drawn from {low} to {high}; these must be numbers with 0 <= low <= high")
        self.guided, self.nothing, self.low, self.high = teacher, nothing, low, high

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        if not condition:
            raise UsageError("a guided teacher is distilled with a condition; this data has none")
        t, r = self.pair(denoiser.schedule, t)
        x = diffuse(denoiser.schedule, x0, t, eps)
        w = self.low + (self.high - self.low) * torch.rand(len(x0), device=x0.device)
        nothing = {name: value.to(x.device).expand_as(condition[name]) for name, value in self.nothing.items()}
        guided = ClassifierFree(self.guided, condition, nothing, w)
        earlier = ode_step(guided, x, t, r, None, self.solver)
        loss = self.compare(denoiser, x, t, earlier, r, {**condition, "guidance": w})
        return loss / gap(denoiser.schedule, t, r).to(loss)
