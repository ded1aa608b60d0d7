"""The order of training, and the batches in that order: each a function of the step.

Training visits positions 0, 1, 2, ...; step k of batches of B visits k B .. k B + B - 1. Position p is in
epoch p // n, at place p % n of that epoch's permutation, which is a function of (seed, epoch). A run that
is resumed at any step, by any number of workers, sees what the uninterrupted one would have seen, and to
find its place costs nothing.

References:
    MosaicML Streaming, elastic determinism: a place in the data as a few numbers
    https://docs.mosaicml.com/projects/streaming
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from reverie.base.errors import DataError, UsageError
from reverie.base.randomness import generator
from reverie.data.dataset import Dataset

MAX_HELD_OUT = 500  # images that a run holds out


class Batch(NamedTuple):
    """What a step trains on.

    Arguments:
        images: The images (B, C, H, W), mirrored where that was drawn.
        labels: Their classes (B,), None without labels.
        positions: Their places in the run (B,).
        indices: Their indices in the data set (B,).
    """

    images: UInt8[Tensor, "b c h w"]
    labels: Int64[Tensor, " b"] | None
    positions: Int64[Tensor, " b"]
    indices: Int64[Tensor, " b"]


@lru_cache(maxsize=8)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: a permutation (count,) fixed by (seed, epoch)."""
    return generator(seed, "order", epoch).permutation(count)


def split(count: int, held_out: float | int, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices to train on and those held out, each sorted, fixed by the seed.

    Arguments:
        count: How many samples there are.
        held_out: The share (a float below 1) or the number held out; at least one sample is left to train on.
        seed: Which ones.

    Example:
        >>> train, held_out = split(10, 0.2, seed=0)
        >>> len(train), len(held_out), sorted(train + held_out) == list(range(10))
        (8, 2, True)
    """
    if count < 1:
        raise DataError("there is no sample to train on")
    wanted = int(held_out * count) if isinstance(held_out, float) else held_out
    if not 0 <= wanted < max(count, 1):
        raise UsageError(f"held_out is {held_out}; of {count} samples it must leave one at least to train on")
    order = generator(seed, "split").permutation(count).tolist()
    return sorted(order[wanted:]), sorted(order[:wanted])


def run_split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Return which samples a run trains on and which it holds out: that share of them, `MAX_HELD_OUT` at most."""
    return split(count, min(held_out, MAX_HELD_OUT / count), seed)


class Batches:
    """A data set in the order of training.

    Arguments:
        dataset: The images.
        batch_size: How many a step takes.
        seed: What the order and the mirroring are a function of.
        indices: The samples to visit; all of them by default.
        flip: Mirror half of the images left to right, chosen by position.
        workers: Threads that prepare batches ahead; 0 prepares each when it is asked for.

    Raises:
        UsageError: A size below 1.
        DataError: There is nothing to visit.

    Example:
        >>> from reverie.data import open_dataset
        >>> batches = Batches(open_dataset("digits"), batch_size=4, seed=0)
        >>> batches.batch(7).positions.tolist()
        [28, 29, 30, 31]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        indices: Sequence[int] | None = None,
        flip: bool = False,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UsageError(f"batch_size is {batch_size}, workers {workers}; they must be at least 1 and 0")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.indices = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.flip, self.workers = flip, workers
        if len(self.indices) == 0:
            raise DataError(f"{dataset.name} has no sample to train on")

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, whatever was asked for before."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        indices = self.indices[[self.place(int(position)) for position in positions]]
        images = self.dataset.images(indices.tolist())
        if self.flip:
            images = torch.where(self.mirrored(positions)[:, None, None, None], images.flip(-1), images)
        labels = self.dataset.labels(indices.tolist())
        return Batch(images, labels, torch.from_numpy(positions), torch.from_numpy(indices))

    def place(self, position: int) -> int:
        """Return which of the indices a position visits."""
        epoch, within = divmod(position, len(self.indices))
        return int(permutation(len(self.indices), self.seed, epoch)[within])

    def mirrored(self, positions: np.ndarray) -> Tensor:
        """Return which positions (B,) are mirrored."""
        return torch.tensor([bool(generator(self.seed, "flip", int(p)).random() < 0.5) for p in positions])

    def stream(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of steps start, start + 1, ... without end; close it to end its threads.

        An error while a batch is prepared is raised where that batch is due.
        """
        if self.workers == 0:
            step = start
            while True:
                yield self.batch(step)
                step += 1
        with ThreadPoolExecutor(self.workers, thread_name_prefix="batches") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in range(start, start + self.workers + 1):
                    ahead.append(pool.submit(self.batch, step))
                while True:
                    step += 1
                    ahead.append(pool.submit(self.batch, step))
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
