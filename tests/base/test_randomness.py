"""Randomness as a function: fixed for ever, independent between keys, indifferent to the batch.

Statistical tests have a fixed seed and a false-positive rate of 1e-5 each.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reverie.base.randomness import MAX_SEED, Noise, generator, normal, normals, torch_seed, uniform

RATE = 1e-5
parts = st.one_of(st.integers(-(2**70), 2**70), st.text("ab1,' ", max_size=4))


def test_golden_values():
    """A change of these numbers changes every picture that was ever made: it needs a new major version."""
    golden = [1.3685013055801392, 0.7359459400177002, 1.6431506872177124, -1.3344049453735352]
    assert normal((4,), 0, "sample", 0).tolist() == golden
    assert uniform((2,), 0, "time", 3).tolist() == [0.35175644217083313, 0.7180783039727365]
    assert torch_seed(0, "dropout", 1) == 8335110416563418527


@given(st.lists(parts, max_size=4), st.lists(parts, max_size=4))
def test_streams_are_equal_exactly_if_keys_are(a, b):
    assert (generator(*a).random(4).tolist() == generator(*b).random(4).tolist()) == (a == b)


def test_kinds_of_integers_are_one_number_and_words_are_not_numbers():
    draw = generator(3).random()
    assert generator(np.int64(3)).random() == draw
    assert generator(torch.tensor(3)).random() == draw
    assert generator("3").random() != draw
    with pytest.raises(TypeError):
        generator(3.0)


def test_the_boundary_between_parts_counts():
    draws = {
        generator(*key).random() for key in [(1, 12), (11, 2), (112,), ("1", "12"), ("112",), ("1, 12",), (1, 1, 2)]
    }
    assert len(draws) == 7


def test_nearby_keys_do_not_collide_and_their_first_numbers_are_uniform():
    first = np.array([generator(seed, "sample", k).random() for seed in range(100) for k in range(100)])
    assert len(set(first.tolist())) == len(first)
    assert stats.kstest(first, "uniform").pvalue > RATE


@pytest.mark.parametrize("other", [(1, "sample", 0), (0, "sample", 1), (0, "noise", 0)])
def test_streams_of_nearby_keys_are_uncorrelated(other):
    count = 200_000
    a, b = normal((count,), 0, "sample", 0), normal((count,), *other)
    bound = stats.norm.isf(RATE / 2) / math.sqrt(count)
    assert abs(float((a * b).mean())) < bound
    assert abs(float((a[1:] * b[:-1]).mean())) < bound


def test_normal_numbers_are_standard_normal():
    z = normal((500, 400), 7, "noise")
    assert z.dtype == torch.float32
    assert z.shape == (500, 400)
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > RATE
    bound = stats.norm.isf(RATE / 2) / math.sqrt(z.numel())
    assert abs(float(z.mean())) < bound
    assert abs(float(z.square().mean()) - 1) < math.sqrt(2) * bound
    assert abs(float(z.pow(4).mean()) - 3) < math.sqrt(96) * bound


@given(st.lists(st.tuples(parts, parts), max_size=5), st.lists(st.integers(0, 3), max_size=3))
def test_rows_are_those_of_a_fresh_generator_for_each_key(keys, shape):
    """Odd counts as well: a generator keeps half of a word for the next number, which must not be another row's."""
    rows = normals(shape, keys)
    assert rows.shape == (len(keys), *shape)
    for row, key in zip(rows, keys, strict=True):
        fresh = generator(*key).standard_normal(tuple(shape), dtype=np.float32)
        assert torch.equal(row, torch.tensor(fresh))


def test_threads_do_not_disturb_each_others_numbers():
    keys = [(seed, "thread") for seed in range(200)]
    alone = normals((33,), keys)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: normals((33,), keys), range(16)))
    assert all(torch.equal(rows, alone) for rows in together)


def test_uniform_numbers_are_uniform():
    u = uniform((100_000,), 7, "time")
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    assert stats.kstest(u.numpy(), "uniform").pvalue > RATE


def test_one_number_has_no_dimension():
    assert normal((), 1).shape == ()
    assert uniform((), 1).shape == ()


def test_seeds_for_torch_are_in_its_range():
    seeds = [torch_seed(s, "dropout") for s in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < MAX_SEED for seed in seeds)


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_rows_noise_does_not_depend_on_its_batch(order, count):
    chosen = order[:count]
    everyone = Noise(list(range(10, 16)))
    among = everyone((3, 2), list(range(6)))
    alone = everyone.rows(chosen)((3, 2), chosen)
    assert torch.equal(alone, among[chosen])


def test_noise_like_has_the_shape_and_dtype_and_takes_a_tensor_of_draws():
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    noise = Noise([0, 1])
    z = noise.like(x, torch.tensor([5, 6]))
    assert z.dtype == torch.float64
    assert torch.equal(z, noise((3, 4), [5, 6]).double())
    assert not torch.equal(z, noise.like(x, [5, 7]))


def test_picture_i_of_seed_s_is_picture_0_of_seed_s_plus_i():
    assert torch.equal(Noise([3, 4, 5])((8,), [0, 0, 0])[2], Noise([5])((8,), [0])[0])


def test_each_sample_needs_its_draw():
    with pytest.raises(ValueError, match="zip"):
        Noise([0, 1])((2,), [0])
