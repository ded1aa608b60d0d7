r"""A second pass at a larger size: a small picture is drawn, enlarged, and drawn anew from part of the way.

    x_t = alpha_t U(x_0) + sigma_t eps  at  t = strength                                                    (1)

with U bicubic enlargement: of latents, where it is these that are denoised. What a network was trained on at one size
it composes well there alone; the second pass adds what the larger size has room for. Each sample is enlarged and drawn
by itself, with its own noise at that size.

References:
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et al., 2022), section 3.2
    https://arxiv.org/abs/2108.01073
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.schedules import Schedule
from reverie.models.conditioning import Conditioner
from reverie.models.editing import Given
from reverie.models.guiding import count_within
from reverie.models.plan import SamplingPlan
from reverie.models.sampling import Progress, execute

MAX_FACTOR = 8
STRENGTH = 0.5  # where none is said


def with_second(plan: SamplingPlan, schedule: Schedule, factor: int | None, strength: float | None) -> SamplingPlan:
    """Return a plan with its second pass; as it is, where none is asked for.

    Arguments:
        plan: The first pass.
        schedule: The denoiser's.
        factor: How many times as high and wide.
        strength: The time that the enlarged picture is taken back to, in (0, 1].

    Raises:
        UsageError: Something is out of range, or would have no effect.
    """
    if factor is None:
        if strength is not None:
            raise UsageError(f"upscale_strength is {strength} without upscale; give both, or neither")
        return plan
    if plan.size == (0, 0) or plan.strength is not None:
        raise UsageError(f"upscale is {factor}; it is of pictures that are drawn from noise; leave it out")
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= MAX_FACTOR:
        raise UsageError(f"upscale is {factor!r}; it must be a whole number in 2..{MAX_FACTOR}")
    t = STRENGTH if strength is None else strength
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t <= 1:
        raise UsageError(
            f"upscale_strength is {t!r}; it must be in (0, 1]: the time that the larger picture starts from"
        )
    grid = plan.grid * t
    height, width = plan.size
    second = replace(
        plan,
        shape=(plan.shape[0], *(factor * side for side in plan.shape[1:])),
        size=(factor * height, factor * width),
        grid=grid,
        strength=float(t),
        batch_size=1,
        calls=plan.sampler.count(schedule, grid),
        guided_calls=None if plan.guiding.interval is None else within(plan, schedule, grid),
        kept=(),
    )
    return replace(plan, second=second)


def within(plan: SamplingPlan, schedule: Schedule, grid: Float[Tensor, " n"]) -> int:
    """Return how many calls of the second pass are guided: none, where the interval ends before."""
    assert plan.guiding.interval is not None
    try:
        return count_within(plan.sampler, schedule, grid, plan.guiding.interval)
    except UsageError:
        return 0


def alone(plan: SamplingPlan, i: int) -> SamplingPlan:
    """Return the plan of one of a plan's samples."""
    own = {name: None if (all_of := getattr(plan, name)) is None else (all_of[i],) for name in EACH}
    return replace(plan, **own)  # type: ignore[arg-type]


EACH = ("seeds", "labels", "prompts", "negatives")


def enlarged(
    denoiser: NetworkDenoiser,
    plan: SamplingPlan,
    x: Float[Tensor, "n c h w"],
    callback: Callable[[Progress], None] | None,
    conditioner: Conditioner | None,
    beside: int,
) -> Float[Tensor, "n c h2 w2"]:
    """Return the samples of a plan after its second pass: (1).

    Arguments:
        denoiser: The model's.
        plan: The plan, with a second pass.
        x: What the first pass gave (n, c, h, w).
        callback: Called after every step.
        conditioner: What reads prompts.
        beside: The bytes that the network and the codec take beside their weights.
    """
    second = plan.second
    assert second is not None
    made = []
    for i, small in enumerate(x):
        start = F.interpolate(small[None], second.shape[1:], mode="bicubic", align_corners=False)[0]
        made.append(execute(denoiser, alone(second, i), callback, conditioner, Given(start), beside)[0])
    return torch.cat(made)
