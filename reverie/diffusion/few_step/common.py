r"""What the objectives of few steps share.

With z = x / alpha and s = sigma / alpha every schedule is the same process z = x_0 + s eps, whose
probability-flow ODE is dz/ds = E[eps | z, s]. A consistency function takes any point of one of its paths to
the path's end,

    f(x_t, t) = x_0,    f(x, 0) = x,                                                                (1)

and any prediction but x0 obeys the second part by its own form: its x_0 is x / alpha less sigma times the
network's output. The distance between two values of f is pseudo-Huber's, of the root mean square,

    d(a, b) = sqrt(mean (a - b)^2 + c^2) - c,                                                       (2)

which is the papers' with their c = 0.00054 sqrt(numbers of a sample), divided by that square root. A step
of the teacher's ODE from t to r is, with E1 at t and E2 where the first has led,

    z_r = z_t + (r - s) E1 (Euler, which is DDIM),    z_r = z_t + (r - s) (E1 + E2) / 2 (Heun).     (3)

References:
    Consistency Models (Song et al., 2023), section 3
    https://arxiv.org/abs/2303.01469
    Improved Techniques for Training Consistency Models (Song & Dhariwal, 2024), eq. 7
    https://arxiv.org/abs/2310.14189
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Schedule

HUBER = 0.00054  # c of (2), for a root mean square
LARGEST = 1e4  # sigma / alpha, beyond which nothing of the data is left anyway

Solver = Literal["euler", "heun"]


def noise_ratio(schedule: Schedule, t: Times) -> Times:
    """Return s = sigma / alpha (B,) at times t (B,), at most 10,000."""
    alpha, sigma = schedule.marginal(t)
    return sigma / alpha.clamp(min=sigma / LARGEST)


def time_of_ratio(schedule: Schedule, ratio: Times) -> Times:
    """Return the t (B,) at which sigma / alpha has that value; 0 for 0.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> time_of_ratio(Flow(), torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        [0.0, 0.5]
    """
    t = schedule.time(-2 * ratio.log()).clamp(max=1)
    return torch.where(ratio > 0, t, 0)


def consistency(denoiser: Denoiser, x: Data, t: Times, condition: Condition | None = None) -> Data:
    """Return f(x, t) (B, *D) by a denoiser's data estimate, and x itself where t is 0: equation (1)."""
    inner = t.clamp(min=denoiser.schedule.t_min)
    estimate = denoiser(x, inner, condition)
    return torch.where(per_sample(t, x) > 0, estimate.x0, x)


def held(denoiser: Denoiser, x: Data, t: Times, condition: Condition | None = None) -> Data:
    """Return f(x, t) (B, *D) as a target: without a gradient."""
    with torch.no_grad():
        return consistency(denoiser, x, t, condition)


def gap(schedule: Schedule, t: Times, r: Times) -> Times:
    """Return s_t - s_r (B,), above 0."""
    return (noise_ratio(schedule, t) - noise_ratio(schedule, r)).clamp(min=1e-12)


def distance(a: Data, b: Data, width: float = HUBER) -> Float[Tensor, " b"]:
    """Return pseudo-Huber's distance (B,) of the root mean square: equation (2).

    Example:
        >>> distance(torch.tensor([[3.0, 5.0]]), torch.zeros(1, 2), width=1e-9).square()
        tensor([17.])
    """
    mean = (a - b).flatten(1).square().mean(1)
    return (mean + width**2).sqrt() - width


def check_width(width: float) -> None:
    """Refuse a width of the distance that is not positive: at 0 its slope is not finite."""
    if not width > 0:
        raise UsageError(f"the distance's width is {width}; it must be positive")


def both(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two computations' results, both from the same state of torch's generators: the same dropout in both."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        one = first()
    return one, second()


@torch.no_grad()
def ode_step(
    teacher: Denoiser, x: Data, t: Times, r: Times, condition: Condition | None = None, solver: Solver = "heun"
) -> Data:
    """Return x_r (B, *D), a step of the teacher's probability-flow ODE from x_t: equation (3).

    A step to r = 0, or from where nothing of the data is left, is Euler's.

    Arguments:
        teacher: The denoiser whose ODE it is.
        x: Where the paths are at t (B, *D).
        t: Where they are, (B,).
        r: Where they go, (B,), at most t.
        condition: What the data is to be.
        solver: euler or heun.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> ode_step(point, torch.zeros(1, 2), torch.tensor([0.5]).double(), torch.tensor([0.0]).double())
        tensor([[1., 1.]])
    """
    schedule = teacher.schedule
    alpha, sigma = (per_sample(value, x) for value in schedule.marginal(r))
    here = teacher(x, t, condition)
    there = alpha * here.x0 + sigma * here.eps
    usual = (r > 0) & (schedule.alpha(t) > 0)
    if solver == "euler" or not bool(usual.any()):
        return there
    inner = torch.where(usual, r, t).clamp(min=schedule.t_min)
    slope = teacher(there, inner, condition).eps - here.eps
    width = torch.where(usual, noise_ratio(schedule, r) - noise_ratio(schedule, t), 0)
    return there + alpha * per_sample(width, x) / 2 * torch.where(per_sample(usual, x) > 0, slope, 0)
