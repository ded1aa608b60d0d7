r"""What all samplers share: the state, the step, and the one loop.

A sampler moves each sample of a batch from its time t to its time s. All that it knows of the past is
in its state, plain tensors with a row for each sample: rows at different steps share a batch, leave it
and join another, and a state that is saved and loaded goes on as if nothing had happened.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate, Times
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.schedules import Schedule

When = Float[Tensor, "*b"] | float  # a time for each sample (B,), or one for all


@dataclass(frozen=True)
class State:
    """Where each sample of a batch is.

    Arguments:
        x: The noisy samples (B, *D).
        t: Their times (B,), float64, on the CPU: no step waits for a device to know where it is.
        k: The steps each has taken (B,), int64, on the CPU; noise is drawn by it.
        x0: The last estimate of the clean samples (B, *D): a preview. Zero before the first step, and where none
            is asked for.
        memory: What a sampler keeps from step to step, by name, tensors of B rows.
    """

    x: Tensor
    t: Float[Tensor, " b"]
    k: Int64[Tensor, " b"]
    x0: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def later(x: Tensor, rest: "Callable[[], State]") -> "State":
        """Return a state of which only x is there: what else it has is made when something of it is asked for."""
        state = object.__new__(State)
        parts = state.__dict__  # frozen, a state takes nothing else
        parts["x"], parts["_rest"] = x, rest
        return state

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Return what is not there yet, made."""
            parts = self.__dict__
            if "_rest" in parts and not name.startswith("__"):
                parts.update(vars(parts["_rest"]()))
            if name not in parts:
                raise AttributeError(f"a state has no {name}")
            return parts[name]

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle it as the tensors that it is."""
        return State, (self.x, self.t, self.k, self.x0, self.memory)

    def rows(self, index: Sequence[int] | Tensor) -> "State":
        """Return the state of some of the samples."""
        if not isinstance(index, Tensor):
            index = torch.tensor(list(index), dtype=torch.int64)  # of no rows, too
        memory = {name: value[index.to(value.device)] for name, value in self.memory.items()}
        there, here = index.to(self.x.device), index.to(self.t.device)
        return State(self.x[there], self.t[here], self.k[here], self.x0[there], memory)

    @staticmethod
    def join(states: Sequence["State"]) -> "State":
        """Return one state of all the samples, in order."""
        memory = {name: torch.cat([state.memory[name] for state in states]) for name in states[0].memory}
        x, t, k, x0 = (torch.cat([getattr(state, name) for state in states]) for name in ("x", "t", "k", "x0"))
        return State(x, t, k, x0, memory)


@dataclass(frozen=True)
class Step:
    """One step of each sample of a batch.

    Arguments:
        here: What the schedule says of the time where each is.
        there: What it says of the time where each goes.
        left: How many steps follow this one, where that is known.
        k: How many each has taken.
        s: Where they go (B,), float64.
    """

    here: Sequence[Level]
    there: Sequence[Level]
    left: Sequence[int | None]
    k: Sequence[int]
    s: Times


@dataclass(frozen=True)
class Sampler(ABC):
    """A rule that moves samples from time t to time s.

    `stochastic` says whether a step draws noise; `adaptive`, whether it calls the denoiser as often as it sees fit;
    `linear`, whether all that a step makes is sums of what it is given, weighted by what the times say (linear.py);
    `tells`, what it tells the network beside the time, of which not every network knows.
    """

    adaptive: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    tells: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "move" in vars(cls) and "linear" not in vars(cls):
            cls.linear = False  # what was said of another's move is not said of this one

    def cost(self, here: Level, there: Level) -> int:
        """Return how often the denoiser is called in a step from one level to another; at least, if adaptive."""
        return 1

    def count(self, schedule: Schedule, grid: Float[Tensor, " n"]) -> int:
        """Return how often the denoiser is called along a grid (N + 1,).

        Example:
            >>> from reverie.diffusion.registry import grids, samplers, schedules
            >>> schedule = schedules["edm"]()
            >>> samplers["heun"]().count(schedule, grids["karras"](schedule, 18))
            35
        """
        return sum(self.cost(here, there) for here, there in pairwise(levels(schedule, grid.tolist())))

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    def init(self, x: Data, t: When) -> State:
        """Return the state of samples x (B, *D) at times t, (B,) or one for all."""
        k = torch.zeros(len(x), dtype=torch.int64)
        return State(x, each(t, len(x)), k, torch.zeros_like(x), self.remember(x))

    def remember(self, x: Data) -> dict[str, Tensor]:
        """Return the memory before the first step."""
        return {}

    def step(
        self, denoiser: Denoiser, state: State, s: When, noise: Noise, left: Sequence[int | None] | int | None = None
    ) -> State:
        """Return the state with each sample moved from its time to its time s.

        Arguments:
            denoiser: The model.
            state: Where the samples are.
            s: Where they go, (B,) or one for all, in [0, t).
            noise: The noise of each sample.
            left: How many steps follow this one, for each or one for all, where that is known: some solvers
                lower their order towards the end.
        """
        s = each(s, len(state.x))
        t, to = state.t.tolist(), s.tolist()
        self.check_direction(t, to)
        known = levels(denoiser.schedule, t + to)
        follow = [left] * len(t) if left is None or isinstance(left, int) else left
        step = Step(known[: len(t)], known[len(t) :], follow, state.k.tolist(), s)
        return replace(self.move(denoiser, state, step, noise), t=s, k=state.k + 1)

    def check_direction(self, t: Sequence[float], s: Sequence[float]) -> None:
        """Refuse a step that does not go towards the data."""
        if not all(0 <= b < a for a, b in zip(t, s, strict=True)):
            raise UsageError(f"a step goes from t to s with 0 <= s < t; got t = {t} and s = {s}")

    @abstractmethod
    def move(self, denoiser: Denoiser, state: State, step: Step, noise: Noise) -> State:
        """Return the state with x, x0 and memory as they are at the step's end; `step` sees to t and k."""


def each(t: When, count: int) -> Times:
    """Return times (B,), float64, on the CPU, of one for each or one for all."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").expand(count)


def ask(denoiser: Denoiser, x: Data, t: Times | Sequence[float]) -> Estimate:
    """Return the denoiser's estimate for x (B, *D) at times t (B,), on x's device."""
    estimate: Estimate = denoiser(x, torch.as_tensor(t, dtype=torch.float64, device=x.device))
    return estimate


def start(
    sampler: Sampler,
    schedule: Schedule,
    shape: Sequence[int],
    t: When,
    noise: Noise,
    device: torch.device | str = "cpu",
) -> State:
    """Return the state of pure noise at time t, (B,) or one for all: draw 0 of each sample's noise, (B, *shape)."""
    z = noise(shape, [0] * len(noise.seeds)).to(device)
    time = each(t, len(z))
    return sampler.init(per_sample(schedule.prior_std(time), z) * z, time)


def run(
    sampler: Sampler,
    denoiser: Denoiser,
    state: State,
    grid: Float[Tensor, "*b n"],
    noise: Noise,
    previews: bool = True,
) -> Iterator[State]:
    """Yield the state after each step along a grid, (N + 1,) for all or (B, N + 1): the one loop.

    Progress, previews, intermediates and cancellation are the caller's, who looks at what is yielded or
    stops asking.

    Arguments:
        sampler: The sampler.
        denoiser: The model.
        state: Where the samples are.
        grid: The times.
        noise: The noise of each sample.
        previews: Whether states have their x0; without, it may be zero, and a step makes no more than it needs.

    Raises:
        UsageError: The state is not where the grid starts.
        NonFiniteError: A step gave NaN or infinity; the message says which step, at what noise level.
    """
    from reverie.diffusion.samplers.linear import recorded, walk

    grid = grid.to(state.t)
    if grid.shape[-1] < 2 or not bool((grid[..., 0] == state.t).all()):
        raise UsageError(
            f"the samples are at t = {state.t.tolist()}; a grid that begins there and has a next time is due, "
            f"not one of {grid.shape[-1]} times from {grid[..., :1].flatten().tolist()}"
        )
    route = recorded(sampler, denoiser, state, grid, previews)
    taken = one_by_one(sampler, denoiser, state, grid, noise) if route is None else walk(route, denoiser, state, noise)
    for after, finite in taken:
        if not finite:
            check_finite(after, denoiser.schedule, state)
        state = after
        yield state


def one_by_one(
    sampler: Sampler, denoiser: Denoiser, state: State, grid: Float[Tensor, "*b n"], noise: Noise
) -> Iterator[tuple[State, bool]]:
    """Yield the state after each step, which the sampler works out anew, and that it isn't known to be finite."""
    levels(denoiser.schedule, grid.unique().tolist())
    last = grid.shape[-1] - 1
    for k in range(1, last + 1):
        # Not around the yield: the caller's code between two steps keeps its gradients.
        with torch.no_grad():
            state = sampler.step(denoiser, state, grid[..., k], noise, last - k)
        yield state, False


def check_finite(state: State, schedule: Schedule, before: State) -> None:
    """Raise NonFiniteError, naming the step and the noise level that it began at, unless the state is finite."""
    if not math.isfinite(state.x.sum().item()) and not bool(torch.isfinite(state.x).all()):
        rows = (~torch.isfinite(state.x.flatten(1)).all(1)).nonzero().flatten().tolist()
        step, level = int(state.k[rows[0]]), float(schedule.sigma(before.t[rows[:1]]))
        raise NonFiniteError(
            f"step {step} (sigma {level:.4g}) gave numbers that are not finite, in sample {rows[0]} "
            f"and {len(rows) - 1} others; the model's weights or its dtype are at fault"
        )


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    shape: Sequence[int],
    grid: Tensor,
    noise: Noise,
    device: torch.device | str = "cpu",
) -> Data:
    """Return samples (B, *shape), one for each of the noise's seeds, from the grid's first time to its last.

    Example:
        >>> from reverie.diffusion import oracles
        >>> from reverie.diffusion.registry import grids, samplers, schedules
        >>> schedule = schedules["flow"]()
        >>> point = oracles.Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), schedule)
        >>> sample(samplers["ddim"](), point, (2,), grids["trailing"](schedule, 5), Noise([0]))
        tensor([[1., 1.]])
    """
    state = start(sampler, denoiser.schedule, shape, grid[..., 0], noise, device)
    *_, last = run(sampler, denoiser, state, grid, noise, previews=False)
    return last.x
