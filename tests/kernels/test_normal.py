"""Noise by the library: NumPy's bits, whatever the key, the count and the threads."""

import numpy as np
import pytest
import torch

from reverie.base.randomness import Filling, normal, normals, plain_fill
from reverie.kernels.normal import fill

TAIL = 3.6541528853610088  # where the ziggurat's tail begins


def both(count, keys):
    found, twin = (torch.full((len(keys), count), 9.0) for _ in range(2))
    fill(found, keys)
    plain_fill(twin, keys)
    return found, twin


def digests(count, seed):
    return [np.random.default_rng((seed, i)).bytes(16) for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 63, 64, 65, 1000, 1023, 1024, 1025, 2050])
def test_it_is_the_twin_at_every_length(level, count):
    """Among 200 keys some have a number that is not settled by its word at the end of a chunk of words."""
    found, twin = both(count, digests(200, count))
    assert torch.equal(found.view(torch.int32), twin.view(torch.int32))


def test_it_is_the_twin_in_millions_of_numbers_tails_and_all(level):
    found, twin = both(1_000_000, [*digests(2, 1), bytes(16), bytes([255]) * 16])
    assert torch.equal(found.view(torch.int32), twin.view(torch.int32))
    assert int((found > TAIL).sum()) > 50
    assert int((found < -TAIL).sum()) > 50


@pytest.mark.slow
def test_it_is_the_twin_in_a_hundred_million_numbers(level):
    for seed in range(100):
        found, twin = both(10_007, digests(100, seed))
        assert torch.equal(found.view(torch.int32), twin.view(torch.int32))


def test_threads_share_the_rows(level):
    keys = digests(5, 3)
    alone = both(3000, keys)[0]
    torch.set_num_threads(2)
    try:
        together = both(3000, keys)[0]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, together)


def test_randomness_uses_it_and_stays_what_it_was(level, monkeypatch):
    assert Filling.fill is fill
    found = normals((3, 5), [(0, "a"), (1, "b")])
    monkeypatch.setattr(Filling, "fill", plain_fill)
    assert torch.equal(found, normals((3, 5), [(0, "a"), (1, "b")]))
    assert torch.equal(found[1], normal((3, 5), 1, "b"))


def test_plain_kernels_leave_it_to_numpy(monkeypatch):
    monkeypatch.setenv("REVERIE_KERNELS", "plain")
    monkeypatch.setattr("reverie.kernels.normal.function", None)  # not to be called
    found, twin = both(20, digests(2, 5))
    assert torch.equal(found, twin)
