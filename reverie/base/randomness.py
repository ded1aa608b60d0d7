r"""Randomness as a function of its purpose, never a state that is passed along.

Every random number here is drawn by a counter-based generator keyed by what it is for,

    z = normal(shape, seed, "noise", step, sample),                                                 (1)

so that a sample's noise does not depend on its batch, a resumed run sees what the uninterrupted one
would have seen, and every device gets the same numbers: they are drawn on the CPU, in float32. NumPy draws
them here; where the kernels are at hand they do, the same bits in a fifth of the time (reverie.kernels.normal).

References:
    Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., 2011)
    https://doi.org/10.1145/2063384.2063405
"""

import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_SEED = 2**63 - 1
PLAIN = (int, str)  # what needs no conversion, which would take a third of a short draw's time


def generator(*key: SupportsIndex | str) -> np.random.Generator:
    """Return the generator of a key: equal keys give equal streams, others independent ones.

    Example:
        >>> bool(generator(0, "order", 3).random() == generator(0, "order", 3).random())
        True

    Raises:
        TypeError: A part of the key that is no integer and no word; a float is no name for anything.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(key), "little")))


def digest(key: Iterable[SupportsIndex | str]) -> bytes:
    """Return the 16 bytes that a key is for Philox."""
    words = [part if type(part) in PLAIN or isinstance(part, str) else int(operator.index(part)) for part in key]
    return blake2b(repr(tuple(words)).encode(), digest_size=16).digest()


class Bench(threading.local):
    """A thread's generator that is set to one key after another: to make one anew takes as long as ten such draws."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.philox)
        self.state = self.philox.state  # of a generator that nothing was drawn from

    def at(self, key: bytes) -> np.random.Generator:
        """Return the generator, at the start of the stream of a key's digest."""
        self.state["state"]["key"] = np.frombuffer(key, "<u8")
        self.philox.state = self.state
        return self.generator


_bench = Bench()
Fill = Callable[[Float[Tensor, "b n"], Sequence[bytes]], None]


def plain_fill(rows: Float[Tensor, "b n"], keys: Sequence[bytes]) -> None:
    """Write standard normal numbers into rows (B, n), float32, each fixed by its key's digest: NumPy's."""
    for row, key in zip(rows.numpy(), keys, strict=True):
        _bench.at(key).standard_normal(dtype=np.float32, out=row)


class Filling:
    """What fills rows with noise: NumPy, until something is at hand that gives the same bits sooner."""

    fill: Fill = staticmethod(plain_fill)


def normal(shape: Sequence[int], *key: SupportsIndex | str) -> Float[Tensor, "..."]:
    """Return standard normal numbers (*shape) in float32, fixed by the key."""
    return normals(shape, [key])[0]


def normals(shape: Sequence[int], keys: Iterable[Sequence[SupportsIndex | str]]) -> Float[Tensor, "b ..."]:
    """Return standard normal numbers (B, *shape) in float32, each row fixed by a key of its own, as `normal`'s.

    Example:
        >>> bool((normals((4,), [(0, "a"), (1, "a")])[1] == normal((4,), 1, "a")).all())
        True
    """
    digests = [digest(key) for key in keys]
    rows = torch.from_numpy(np.empty((len(digests), math.prod(shape)), np.float32))
    Filling.fill(rows, digests)
    return rows.view(len(digests), *shape)


def uniform(shape: Sequence[int], *key: SupportsIndex | str) -> Float[Tensor, "..."]:
    """Return numbers (*shape) uniform in [0, 1) in float64, fixed by the key."""
    return torch.from_numpy(generator(*key).random(tuple(shape)))


def torch_seed(*key: SupportsIndex | str) -> int:
    """Return a seed for torch's own generators (dropout), fixed by the key."""
    return int(generator(*key).integers(MAX_SEED))


@dataclass(frozen=True)
class Noise:
    """Sampling noise that belongs to its sample: fixed by (seed, draw), whatever the batch.

    Arguments:
        seeds: The seed of each sample (B,).

    Example:
        >>> among, alone = Noise([5, 6, 7]), Noise([7])
        >>> bool((among((4,), [0, 0, 3])[2] == alone((4,), [3])[0]).all())
        True
    """

    seeds: Sequence[int]

    def __call__(self, shape: Sequence[int], draws: Sequence[int]) -> Float[Tensor, "b ..."]:
        """Return standard normal noise (B, *shape): row i is draw draws[i] of seed seeds[i]."""
        return normals(shape, [(s, "sample", int(d)) for s, d in zip(self.seeds, draws, strict=True)])

    def like(self, x: Tensor, draws: Sequence[int] | Tensor) -> Tensor:
        """Return noise of x's shape (B, *D), in its dtype and on its device."""
        return self(x.shape[1:], draws.tolist() if isinstance(draws, Tensor) else draws).to(x)

    def rows(self, index: Sequence[int]) -> "Noise":
        """Return the noise of some of the samples."""
        return Noise([self.seeds[i] for i in index])
