r"""Linear samplers' runs as numbers: each step is worked out once, and then carried out in one walk over memory.

A step of most samplers is linear in all that it is given,

    y_i = sum_j w_ij x_j,    x = (x_t, memory, F_1, ..., z_1, ...),                                 (1)

with F the network's outputs and z the noise, and weights that follow from the times alone. They are written down
nowhere: `Sampler.step` is taken on a sample whose numbers are the unit vectors, x_j being the j-th, so that what comes
out of it are the rows of w, in float64, the prediction's conversion included. They are remembered with the sampler, the
schedule and the grid; a run then looks up and sums. The sampler's own steps are the twin that tests hold this to.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, NetworkDenoiser, Times
from reverie.diffusion.levels import levels
from reverie.diffusion.predictions import Data, Prediction
from reverie.diffusion.samplers.base import Sampler, State
from reverie.diffusion.schedules import Schedule
from reverie.kernels.blend import Blend, alike
from reverie.kernels.dispatch import fast, traced

ROOM = 24  # tensors in memory, outputs and draws of a step, all together, at the most

Row = tuple[float, ...]
Pick = Callable[[list[Tensor]], tuple[Tensor, ...]]


class Sums(NamedTuple):
    """Some of the sums (1): what is to be computed, and which of old and new each of them then is.

    Arguments:
        blend: The sums that are computed; None where all are there already.
        terms: Picks what they are computed of.
        picks: Picks all the sums out of what there was and what was computed.
        fresh: Whether the first of them is computed.
    """

    blend: Blend | None
    terms: Pick
    picks: Pick
    fresh: bool

    @staticmethod
    def of(rows: Sequence[Row], count: int) -> "Sums":
        """Return the sums of some weights, of which the first `count` may be other than 0. A unit vector is no sum."""
        fresh = list(dict.fromkeys(row for row in rows if unit(row) is None))
        terms = [j for j in range(count) if any(row[j] for row in fresh)] or [0]
        blend = Blend([[row[j] for j in terms] for row in fresh]) if fresh else None
        picks = [count + fresh.index(row) if (j := unit(row)) is None else j for row in rows]
        return Sums(blend, picker(terms), picker(picks), picks[0] >= count)

    def __call__(self, pool: list[Tensor], quick: bool) -> tuple[tuple[Tensor, ...], bool]:
        """Return the sums of what is in the pool, and whether the first is known to be finite."""
        blend, terms, picks, fresh = self
        if blend is None:
            return picks(pool), False
        made, finite = blend.fast(terms(pool)) if quick else (blend.plain(terms(pool)), False)
        return picks(pool + made), finite and fresh


def picker(places: Sequence[int]) -> Pick:
    """Return what takes the items at some places out of a list."""
    return itemgetter(*places) if len(places) > 1 else lambda items: (items[places[0]],)


def unit(row: Row) -> int | None:
    """Return which unit vector a row of weights is, or None."""
    return row.index(1.0) if row.count(0.0) == len(row) - 1 and 1.0 in row else None


class Ask(NamedTuple):
    """The network, or the denoiser, is asked at a sum and at a time."""

    at: Sums
    time: float


class Move(NamedTuple):
    """A step: what is asked and which noise is drawn, in order; the sums x, memory and maybe x0; memory's numbers."""

    events: tuple[Ask | int, ...]
    ends: Sums
    numbers: Row


class Route(NamedTuple):
    """A run's steps.

    Arguments:
        steps: The steps.
        times: Where each ends.
        asked: When something is asked, in order.
        tensors: The names of the tensors in memory.
        numbers: The names of the numbers in memory.
    """

    steps: tuple[Move, ...]
    times: Row
    asked: Row
    tensors: tuple[str, ...]
    numbers: tuple[str, ...]


# Recording -----------------------------------------------------------------------------------------


class Tape:
    """What a step does, as it is taken on unit vectors."""

    def __init__(self) -> None:
        self.units = torch.eye(ROOM, dtype=torch.float64)
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.count, self.events = 0, list[Ask | int]()

    def fresh(self) -> Tensor:
        """Return the next unit vector, as a sample."""
        self.count += 1
        return self.units[self.count - 1 : self.count]

    def asked(self, x: Tensor, time: Tensor) -> None:
        """Note that something is asked at x."""
        self.events.append(Ask(Sums.of([row_of(x)], self.count), time.item()))


def row_of(x: Tensor) -> Row:
    """Return the numbers of a sample (1, n)."""
    (row,) = x.tolist()
    return tuple(row)


class Unknown(nn.Module):
    """A network in whose place there is a unit vector."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.tape.asked(x, time)
        return self.tape.fresh()


class UnknownEstimate(Denoiser):
    """A denoiser of whose estimates each is a unit vector."""

    def __init__(self, tape: Tape, schedule: Schedule) -> None:
        super().__init__()
        self.tape, self.schedule = tape, schedule

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        self.tape.asked(x, t)
        return Estimate(self.tape.fresh(), self.tape.fresh())


@dataclass(frozen=True)
class UnknownNoise(Noise):
    """Noise that is a unit vector."""

    tape: Tape

    def __call__(self, shape: Sequence[int], draws: Sequence[int]) -> Tensor:
        self.tape.events.append(int(draws[0]))
        return self.tape.fresh()


class Start(NamedTuple):
    """Where a run begins: its steps so far, the names of the tensors in memory, and the numbers there by name."""

    k: int
    tensors: tuple[str, ...]
    numbers: tuple[tuple[str, float], ...]


@lru_cache(maxsize=16)
def moves(
    sampler: Sampler, schedule: Schedule, prediction: Prediction | None, grid: Row, start: Start, previews: bool = True
) -> Route | None:
    """Return the steps along a grid, or None where they are no finite sums.

    Arguments:
        sampler: A linear one.
        schedule: The denoiser's.
        prediction: What the network's output means; None to be given the denoiser's estimates.
        grid: The times.
        start: Where the run begins.
        previews: Whether a step makes x0, even where nothing comes of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        steps = record(sampler, schedule, prediction, grid, start, previews)
    if steps is None:
        return None
    asked = tuple(event.time for step in steps for event in step.events if isinstance(event, Ask))
    return Route(steps, grid[1:], asked, start.tensors, tuple(name for name, _ in start.numbers))


def record(
    sampler: Sampler, schedule: Schedule, prediction: Prediction | None, grid: Row, start: Start, previews: bool
) -> tuple[Move, ...] | None:
    """Return the steps along a grid, taken on unit vectors, or None where they are no finite sums."""
    found, numbers, tape = [], dict(start.numbers), Tape()
    if prediction is None:
        denoiser: Denoiser = UnknownEstimate(tape, schedule)
    else:
        denoiser = NetworkDenoiser(Unknown(tape), schedule, prediction)
    levels(schedule, grid)  # all at once
    for j, (t, s) in enumerate(pairwise(grid)):
        tape.start()
        x, *past = (tape.fresh() for _ in range(1 + len(start.tensors)))
        memory = dict(zip(start.tensors, past, strict=True)) | {name: one(value) for name, value in numbers.items()}
        state = State(x, one(t), torch.tensor([start.k + j]), torch.zeros_like(x), memory)
        try:
            end = sampler.step(denoiser, state, s, UnknownNoise([0], tape), len(grid) - 2 - j)
        except UsageError:
            return None  # the step itself will say so when its turn comes
        due = [end.x, *(end.memory[name] for name in start.tensors), *[end.x0] * previews]
        rows = [row_of(y) for y in due]
        if not all(math.isfinite(sum(row)) for row in rows):
            return None
        numbers = {name: end.memory[name].item() for name in numbers}
        found.append(Move(tuple(tape.events), Sums.of(rows, tape.count), tuple(numbers.values())))
    return tuple(found)


def one(value: float) -> Tensor:
    """Return a number (1,), float64."""
    return torch.tensor([value], dtype=torch.float64)


# Running -------------------------------------------------------------------------------------------


def recorded(sampler: Sampler, denoiser: Denoiser, state: State, grid: Tensor, previews: bool = True) -> Route | None:
    """Return the steps of a run along a grid, (N + 1,) or (B, N + 1), or None where each is to be worked out anew.

    They are numbers where the sampler is linear and all samples go the same way from the same past.
    """
    x, memory = state.x, state.memory
    if not sampler.linear or x.ndim < 2 or not len(x) or traced() or torch.compiler.is_compiling():
        return None
    # The names of what is kept of past samples, in an order that a state's being saved does not change.
    tensors = tuple(sorted(name for name, value in memory.items() if value.shape == x.shape))
    others = {name: value for name, value in memory.items() if name not in tensors}
    if any(value.shape != state.t.shape for value in others.values()):
        return None
    if not all(same(value) for value in (state.k, *others.values())) or (grid.ndim > 1 and not same(grid)):
        return None
    start = Start(int(state.k[0]), tensors, tuple((name, value[0].item()) for name, value in others.items()))
    times = tuple((grid if grid.ndim == 1 else grid[0]).tolist())
    return moves(sampler, denoiser.schedule, prediction_of(denoiser), times, start, previews)


def same(rows: Tensor) -> bool:
    """Whether all rows are the same."""
    return len(rows) == 1 or bool((rows == rows[:1]).all())


def prediction_of(denoiser: Denoiser) -> Prediction | None:
    """Return what a network's output means where nothing stands between it and the sampler, else None."""
    if type(denoiser) is not NetworkDenoiser or denoiser.learned_variance:
        return None
    watched = denoiser._forward_hooks or denoiser._forward_pre_hooks
    return None if watched else denoiser.prediction


def walk(route: Route, denoiser: Denoiser, state: State, noise: Noise) -> Iterator[tuple[State, bool]]:
    """Yield the state after each step of a route, and whether its x is known to be finite."""
    like = torch.empty_like(state.x)
    pool = [alike(y, like) for y in (state.x, *(state.memory[name] for name in route.tensors))]
    quick, count, answer = fast(like, dtypes=(torch.float32,)), len(like), answers(denoiser, like)
    times, taken, kept = clocks(route.asked, denoiser, like), int(state.k[0]), len(pool)
    switch, gradients_on = torch._C._set_grad_enabled, torch.is_grad_enabled
    for j, (events, ends, _) in enumerate(route.steps):
        gradients = gradients_on()
        switch(False)  # what torch.no_grad does, in a tenth of its time
        try:
            for event in events:
                if isinstance(event, int):
                    pool.append(alike(noise.like(like, [event] * count), like))
                else:
                    ((x,), _) = event.at(pool, quick)
                    pool += answer(x, next(times))
            made, finite = ends(pool, quick)
        finally:
            switch(gradients)
        pool = list(made[:kept])
        yield State.later(made[0], partial(after, route, j, taken + j + 1, made)), finite


def after(route: Route, j: int, k: int, made: tuple[Tensor, ...]) -> State:
    """Return the state after step j of a route, the k-th of the samples', of what it made."""
    (x, *past), count = made[: 1 + len(route.tensors)], len(made[0])
    with torch.inference_mode(False):
        numbers = (torch.full((count,), number, dtype=torch.float64) for number in route.steps[j].numbers)
        memory = dict(zip(route.tensors, past, strict=True)) | dict(zip(route.numbers, numbers, strict=True))
        t, steps = torch.full((count,), route.times[j], dtype=torch.float64), torch.full((count,), k)
        return State(x, t, steps, made[-1] if len(made) > 1 + len(past) else torch.zeros_like(x), memory)


def answers(denoiser: Denoiser, like: Tensor) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return what asks the network, or the denoiser, at (B, *D) and times (B,) for what units were in the place of."""
    if not isinstance(denoiser, NetworkDenoiser) or prediction_of(denoiser) is None:
        return lambda x, t: [alike(y, like) for y in denoiser(x, t)[:2]]
    if denoiser.dtype is not None:
        return lambda x, time: [alike(denoiser.evaluate(x, time), like)]
    network, dtype, shape, strides = denoiser.network, like.dtype, like.shape, like.stride()

    def ask(x: Tensor, time: Tensor) -> list[Tensor]:
        y = network(x, time)
        if type(y) is Tensor and y.shape == shape and y.stride() == strides and y.dtype is dtype:
            return [y]
        denoiser.check_shape(y, x)
        return [alike(y, like)]

    return ask


def clocks(times: Row, denoiser: Denoiser, like: Tensor) -> Iterator[Tensor]:
    """Return the times (B,) of all that is asked, in order, as it is to be given them."""
    dtype = torch.float64 if prediction_of(denoiser) is None else like.dtype
    every, each = columns_of(times, len(like), dtype, like.device)
    if every._version:  # a network has written into what it was given
        columns_of.cache_clear()
        return clocks(times, denoiser, like)
    return iter(each)


@lru_cache(maxsize=16)
def columns_of(times: Row, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return numbers as one tensor (N, B), and each of them as a view of it (B,)."""
    with torch.inference_mode(False):
        every = torch.tensor(times, dtype=torch.float64).to(device, dtype)[:, None].repeat(1, count)
        return every, every.unbind()
