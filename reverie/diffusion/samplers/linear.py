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
from functools import lru_cache
from itertools import pairwise
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


class Sums(NamedTuple):
    """Some of the sums (1): what is to be computed of what, and which of old and new each of them then is."""

    blend: Blend | None
    terms: tuple[int, ...]
    picks: tuple[int, ...]

    @staticmethod
    def of(rows: Sequence[Row], count: int) -> "Sums":
        """Return the sums of some weights, of which the first `count` may be other than 0. A unit vector is no sum."""
        fresh = list(dict.fromkeys(row for row in rows if unit(row) is None))
        terms = [j for j in range(count) if any(row[j] for row in fresh)] or [0]
        blend = Blend([[row[j] for j in terms] for row in fresh]) if fresh else None
        picks = [count + fresh.index(row) if (j := unit(row)) is None else j for row in rows]
        return Sums(blend, tuple(terms), tuple(picks))

    def __call__(self, pool: list[Tensor], quick: bool) -> tuple[list[Tensor], bool]:
        """Return the sums of what is in the pool, and whether the first is known to be finite."""
        if self.blend is None:
            return [pool[i] for i in self.picks], False
        given = [pool[j] for j in self.terms]
        fresh, finite = self.blend.fast(given) if quick else (self.blend.plain(given), False)
        finite = finite and self.picks[0] >= len(pool)
        pool += fresh
        return [pool[i] for i in self.picks], finite


def unit(row: Row) -> int | None:
    """Return which unit vector a row of weights is, or None."""
    return row.index(1.0) if row.count(0.0) == len(row) - 1 and 1.0 in row else None


class Ask(NamedTuple):
    """The network, or the denoiser, is asked at a sum and at a time."""

    at: Sums
    time: float


class Move(NamedTuple):
    """A step: what is asked and which noise is drawn, in order; the sums x, x0 and memory; and memory's numbers."""

    events: tuple[Ask | int, ...]
    ends: Sums
    numbers: Row


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
    sampler: Sampler, schedule: Schedule, prediction: Prediction | None, grid: Row, start: Start
) -> tuple[Move, ...] | None:
    """Return the steps along a grid, or None where they are no finite sums.

    Arguments:
        sampler: A linear one.
        schedule: The denoiser's.
        prediction: What the network's output means; None to be given the denoiser's estimates.
        grid: The times.
        start: Where the run begins.
    """
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
        rows = [row_of(y) for y in (end.x, end.x0, *(end.memory[name] for name in start.tensors))]
        if not all(math.isfinite(sum(row)) for row in rows):
            return None
        numbers = {name: end.memory[name].item() for name in numbers}
        found.append(Move(tuple(tape.events), Sums.of(rows, tape.count), tuple(numbers.values())))
    return tuple(found)


def one(value: float) -> Tensor:
    """Return a number (1,), float64."""
    return torch.tensor([value], dtype=torch.float64)


# Running -------------------------------------------------------------------------------------------


def recorded(sampler: Sampler, denoiser: Denoiser, state: State, grid: Tensor) -> tuple[Move, ...] | None:
    """Return the steps of a run along a grid, (N + 1,) or (B, N + 1), or None where each is to be worked out anew.

    They are numbers where the sampler is linear and all samples go the same way from the same past.
    """
    x, memory = state.x, state.memory
    if not sampler.linear or x.ndim < 2 or not len(x) or traced() or torch.compiler.is_compiling():
        return None
    tensors = names_of(state)
    others = {name: value for name, value in memory.items() if name not in tensors}
    if any(value.shape != state.t.shape for value in others.values()):
        return None
    if not all(same(value) for value in (state.k, *others.values())) or (grid.ndim > 1 and not same(grid)):
        return None
    start = Start(int(state.k[0]), tensors, tuple((name, value[0].item()) for name, value in others.items()))
    times = tuple((grid if grid.ndim == 1 else grid[0]).tolist())
    with torch.inference_mode(False), torch.no_grad():
        return moves(sampler, denoiser.schedule, prediction_of(denoiser), times, start)


def names_of(state: State) -> tuple[str, ...]:
    """Return the names of what is kept of past samples, in an order that a state's being saved does not change."""
    return tuple(sorted(name for name, value in state.memory.items() if value.shape == state.x.shape))


def same(rows: Tensor) -> bool:
    """Whether all rows are the same."""
    return len(rows) == 1 or bool((rows == rows[:1]).all())


def prediction_of(denoiser: Denoiser) -> Prediction | None:
    """Return what a network's output means where nothing stands between it and the sampler, else None."""
    if type(denoiser) is not NetworkDenoiser or denoiser.learned_variance:
        return None
    watched = denoiser._forward_hooks or denoiser._forward_pre_hooks
    return None if watched else denoiser.prediction


def walk(
    steps: Sequence[Move], denoiser: Denoiser, state: State, grid: Tensor, noise: Noise
) -> Iterator[tuple[State, bool]]:
    """Yield the state after each of some recorded steps, and whether its x is known to be finite."""
    names = names_of(state)
    numbers = [name for name in state.memory if name not in names]
    like = torch.empty_like(state.x)
    pool = [alike(y, like) for y in (state.x, *(state.memory[name] for name in names))]
    quick, count, answer = fast(like, dtypes=(torch.float32,)), len(like), answers(denoiser, like)
    to = grid.reshape(-1, grid.shape[-1])[:1, 1:].T.expand(-1, count).unbind()
    k = (state.k + torch.arange(1, len(steps) + 1)[:, None]).unbind()
    rows, times = table([step.numbers for step in steps], count), iter(asked_at(steps, denoiser, like))
    switch = torch._C._set_grad_enabled
    for step, t, n, row in zip(steps, to, k, rows, strict=True):
        gradients = torch.is_grad_enabled()
        switch(False)  # what torch.no_grad does, in a tenth of its time
        try:
            for event in step.events:
                if isinstance(event, int):
                    pool.append(alike(noise.like(like, [event] * count), like))
                else:
                    at = event.at
                    x = pool[at.picks[0]] if at.blend is None else at(pool.copy(), quick)[0][0]
                    pool += answer(x, next(times))
            (x, x0, *past), finite = step.ends(pool, quick)
        finally:
            switch(gradients)
        pool = [x, *past]
        memory = dict(zip(names, past, strict=True)) | dict(zip(numbers, row, strict=True)) if names else {}
        yield State(x, t, n, x0, memory), finite


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


def asked_at(steps: Sequence[Move], denoiser: Denoiser, like: Tensor) -> Sequence[Tensor]:
    """Return the times (B,) of all that is asked, in order, as it is to be given them."""
    times = [event.time for step in steps for event in step.events if isinstance(event, Ask)]
    dtype = torch.float64 if prediction_of(denoiser) is None else like.dtype
    return torch.tensor(times, dtype=torch.float64).to(like.device, dtype)[:, None].repeat(1, len(like)).unbind()


def table(rows: Sequence[Row], count: int) -> list[Sequence[Tensor]]:
    """Return numbers, some for each step, as tensors (B,) of one for each sample."""
    if not rows[0]:
        return [()] * len(rows)
    numbers = torch.tensor(rows, dtype=torch.float64)[:, :, None].repeat(1, 1, count)
    return [row.unbind() for row in numbers.unbind()]
