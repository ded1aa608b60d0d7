r"""Time grids: the times that a sampler walks, from noise to t = 0.

A grid for N steps is N + 1 decreasing times in float64, the last of them 0: N intervals, N evaluations.
On a table the three spacings below choose among its integer timesteps i, which lie at t = (i + 1) / T;
on a continuous schedule they mean the limit of that. A sampler is handed both ends of each interval and
never works out a neighbour by itself, so that every step lands where the next one starts.

    leading    i = k floor(T / N) + offset                 ends at the first timestep, starts short of the last
    trailing   i = round(T - k T / N) - 1                  starts at the last
    linspace   i = round(k (T - 1) / (N - 1))              both ends
    karras     s = (s_max^(1/rho) + k/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho, s = sigma / alpha
    log-snr    uniform in ln(alpha^2 / sigma^2)
    angle      phi = phi(1) - k / N (phi(1) - phi(t_min)), phi = arctan(sigma / alpha): for a few large steps

References:
    Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023), table 2
    https://arxiv.org/abs/2305.08891
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 5
    https://arxiv.org/abs/2206.00364
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.schedules import Schedule, Table

Grid = Float[Tensor, " n"]


def close(times: Tensor) -> Grid:
    """Return the times with a final 0, checked to decrease."""
    grid = torch.cat([times.to(torch.float64), torch.zeros(1, dtype=torch.float64)])
    if len(grid) < 2:
        raise UsageError("a grid needs at least one time; these are none")
    if not grid[0] <= 1:
        raise UsageError(f"a grid's times lie in (0, 1]; the first of these is {grid[0].item():g}")
    wrong = (~(grid[1:] < grid[:-1])).nonzero().flatten().tolist()
    if wrong:
        a, b = grid[wrong[0]].item(), grid[wrong[0] + 1].item()
        raise UsageError(f"a grid's times decrease to 0; of these, number {wrong[0]} is {a:g} and the next {b:g}")
    return grid


def check_steps(schedule: Schedule, steps: int) -> None:
    """Refuse a number of steps that the schedule can't give: below 1, or beyond a table's entries."""
    most = schedule.timesteps if isinstance(schedule, Table) else 1_000_000
    if not 1 <= steps <= most:
        raise UsageError(f"steps is {steps}; it must lie in 1..{most} on this schedule")


def leading(schedule: Schedule, steps: int, offset: int = 0) -> Grid:
    """Return the leading grid (steps + 1,): multiples of T // steps, plus an offset (on a table)."""
    check_steps(schedule, steps)
    if not isinstance(schedule, Table):
        if offset:
            raise UsageError(f"offset is {offset}; it counts a table's timesteps, and this schedule is no table")
        left = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps
        return close(left * (1 - schedule.t_min) + schedule.t_min)
    stride = schedule.timesteps // steps
    timesteps = torch.arange(steps - 1, -1, -1) * stride + offset
    if offset < 0 or timesteps[0] >= schedule.timesteps:
        raise UsageError(
            f"offset {offset} takes {steps} leading steps to timestep {int(timesteps[0])}, off the table of "
            f"{schedule.timesteps}; lower it, or use trailing"
        )
    return close(schedule.time_of_timestep(timesteps))


def trailing(schedule: Schedule, steps: int) -> Grid:
    """Return the trailing grid (steps + 1,): from t = 1 in equal strides.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> trailing(Flow(), 4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_steps(schedule, steps)
    left = torch.arange(steps, 0, -1, dtype=torch.float64)
    if isinstance(schedule, Table):
        return close(schedule.time_of_timestep((left * schedule.timesteps / steps).round() - 1))
    return close(left / steps)


def linspace(schedule: Schedule, steps: int) -> Grid:
    """Return the linspace grid (steps + 1,): from t = 1 to the first time, both ends in it."""
    check_steps(schedule, steps)
    if isinstance(schedule, Table):
        timesteps = torch.linspace(schedule.timesteps - 1, 0, steps, dtype=torch.float64).round()
        return close(schedule.time_of_timestep(timesteps))
    return close(torch.linspace(1, schedule.t_min, steps, dtype=torch.float64))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Grid:
    """Return Karras' grid (steps + 1,): noise levels evenly spaced in their rho-th root."""
    check_steps(schedule, steps)
    if not rho > 0:
        raise UsageError(f"rho is {rho}; it must be positive")
    first, last = (math.exp(-level / 2) for level in ends(schedule))
    levels = torch.linspace(first ** (1 / rho), last ** (1 / rho), steps, dtype=torch.float64) ** rho
    return from_log_snr(schedule, -2 * levels.log())


def uniform_log_snr(schedule: Schedule, steps: int) -> Grid:
    """Return the grid (steps + 1,) uniform in log_snr."""
    check_steps(schedule, steps)
    return from_log_snr(schedule, torch.linspace(*ends(schedule), steps, dtype=torch.float64))


def angle(schedule: Schedule, steps: int) -> Grid:
    """Return the grid (steps + 1,) of equal strides of arctan(sigma / alpha), from t = 1.

    Example:
        >>> from reverie.diffusion.schedules import Flow
        >>> [round(t, 3) for t in angle(Flow(), 2).tolist()]
        [1.0, 0.5, 0.0]
    """
    check_steps(schedule, steps)
    alpha, sigma = schedule.marginal(torch.tensor([1.0, schedule.t_min], dtype=torch.float64))
    first, last = torch.atan2(sigma, alpha).tolist()
    phi = first - torch.arange(steps, dtype=torch.float64) / steps * (first - last)
    times = schedule.time(-2 * phi.tan().log())
    times[0] = 1.0
    return close(times)


def ends(schedule: Schedule) -> tuple[float, float]:
    """Return log_snr at t = 1 and at t_min; where it is -inf at t = 1, that at t = 0.999 instead."""
    latest = 0.999 if schedule.zero_terminal_snr else 1.0
    start, end = schedule.log_snr(torch.tensor([latest, schedule.t_min], dtype=torch.float64)).tolist()
    return start, end


def from_log_snr(schedule: Schedule, log_snr: Float[Tensor, " m"]) -> Grid:
    """Return the grid (N + 1,) of increasing log_snr (N,), its ends moved to t_min and t = 1 exactly."""
    times = schedule.time(log_snr)
    times[-1] = schedule.t_min
    times[0] = 1.0
    return close(times)


def from_times(times: Sequence[float]) -> Grid:
    """Return the grid (N + 1,) of any N decreasing times in (0, 1]; the final 0 is added where it lacks."""
    times = [float(t) for t in times]
    return close(torch.tensor(times[:-1] if times[-1:] == [0] else times, dtype=torch.float64))


def from_timesteps(schedule: Schedule, timesteps: Sequence[int]) -> Grid:
    """Return the grid (N + 1,) of any N decreasing integer timesteps of a table."""
    if not isinstance(schedule, Table):
        raise UsageError("a list of integer timesteps needs a schedule that is a table; give times in (0, 1] instead")
    if any(not 0 <= i < schedule.timesteps for i in timesteps):
        raise UsageError(f"timesteps must lie in 0..{schedule.timesteps - 1}; these are {list(timesteps)}")
    return close(schedule.time_of_timestep(torch.tensor(list(timesteps))))
