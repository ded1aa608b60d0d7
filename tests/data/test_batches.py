"""The order of training: a function of the step, whoever prepares it."""

from collections import Counter
from itertools import islice

import pytest
import torch

from reverie.base.errors import DataError, UsageError
from reverie.data import open_dataset
from reverie.data.batches import Batches, split


@pytest.fixture(scope="module")
def shapes():
    return open_dataset("shapes:16,count=21")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def test_an_epoch_visits_each_sample_once(shapes):
    batches = Batches(shapes, 5, seed=0, indices=range(3, 18))
    seen = Counter(int(i) for step in range(6) for i in batches.batch(step).indices)
    assert seen == dict.fromkeys(range(3, 18), 2)


def test_epochs_and_seeds_differ_in_order(shapes):
    first = [Batches(shapes, 21, seed=seed).batch(step).indices.tolist() for seed, step in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in first}) == 3


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_stream_is_the_batches_from_any_step_for_any_number_of_workers(shapes, workers):
    plain = Batches(shapes, 4, seed=3, flip=True)
    stream = Batches(shapes, 4, seed=3, flip=True, workers=workers).stream(start=5)
    for step, batch in enumerate(islice(stream, 9), start=5):
        assert same(batch, plain.batch(step))
    stream.close()


def test_a_batch_may_be_larger_than_the_data(shapes):
    counts = Counter(Batches(shapes, 50, seed=0).batch(0).indices.tolist())
    assert set(counts.values()) == {2, 3}


def test_half_of_the_images_are_mirrored(shapes):
    """4,000 positions: within 4.5 standard errors, a false alarm in 150,000."""
    import numpy as np

    mirrored = Batches(shapes, 4, seed=0, flip=True).mirrored(np.arange(4000)).double().mean()
    assert abs(float(mirrored) - 0.5) < 4.5 * 0.5 / 4000**0.5
    plain, flipped = Batches(shapes, 21, 0).batch(0), Batches(shapes, 21, 0, flip=True).batch(0)
    turned = [
        torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)
    ]
    kept = [torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert any(turned)


def test_an_error_reaches_who_asks(shapes, monkeypatch):
    batches = Batches(shapes, 4, seed=0, workers=2)

    def broken(indices):
        raise DataError("cat.png: truncated")

    monkeypatch.setattr(type(shapes), "images", lambda self, indices: broken(indices))
    with pytest.raises(DataError, match=r"cat\.png"):
        next(batches.stream())


def test_the_split_is_fixed_disjoint_and_leaves_something_to_train_on():
    train, held_out = split(100, 0.1, seed=0)
    assert len(held_out) == 10
    assert not set(train) & set(held_out)
    assert split(100, 0.1, seed=0) == (train, held_out)
    assert split(100, 0.1, seed=1) != (train, held_out)
    assert split(1, 0.9, seed=0) == ([0], [])
    with pytest.raises(UsageError, match="must leave one"):
        split(5, 5, seed=0)


def test_sizes_and_empty_data_are_refused(shapes):
    with pytest.raises(UsageError, match="batch_size is 0"):
        Batches(shapes, 0, seed=0)
    with pytest.raises(DataError, match="no sample to train on"):
        Batches(shapes, 4, seed=0, indices=[])
