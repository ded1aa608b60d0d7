"""Sums of tensors by the library, against their twin in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.blend import MOST, Blend, alike


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, MOST + 1), st.integers(1, 4), st.sampled_from([1, 7, 16, 33, 1000, 40_000]))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_twin(level, terms, sums, count):
    blend = Blend(numbers(sums, terms, seed=1).tolist())
    tensors = [numbers(2, count, seed=2 + j) for j in range(terms)]
    found, finite = blend.fast(tensors)
    assert finite == (terms <= MOST)
    for a, b in zip(found, blend.plain([x.double() for x in tensors]), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6 * terms)


def test_a_number_has_the_same_bits_wherever_it_stands(level):
    blend, x, y = Blend([[0.3, -1.7]]), numbers(50_001), numbers(50_001, seed=1)
    ((whole,), _) = blend.fast([x, y])
    for begin, end in ((0, 1), (5, 22), (16_383, 49_999), (50_000, 50_001)):
        ((part,), _) = blend.fast([x[begin:end], y[begin:end]])
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 40, 20_000])
def test_it_says_whether_all_is_finite(level, bad, place):
    x, y = numbers(20_001), torch.full((20_001,), 3e38)
    assert Blend([[1.0, 0.9], [0.5, 0.5]]).fast([x, y])[1]
    x[place] = bad
    assert not Blend([[1.0, 0.9], [0.5, 0.5]]).fast([x, y])[1]
    assert not Blend([[0.0, 2.0]]).fast([torch.zeros(5), torch.full((5,), 3e38)])[1]


def test_images_in_channels_last(level):
    x, y = (numbers(2, 4, 6, 6, seed=j).to(memory_format=torch.channels_last) for j in (0, 1))
    ((found,), _) = Blend([[0.5, 2.0]]).fast([x, y])
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, 0.5 * x + 2 * y)


def test_what_is_alike_is_left_alone_and_what_is_not_is_moved():
    x, y = numbers(2, 4, 6, 6), numbers(2, 4, 6, 6, seed=1)
    assert alike(y, x) is y
    for other in (y.double(), y.to(memory_format=torch.channels_last), torch.nn.Parameter(y)):
        moved = alike(other.detach() if other.requires_grad else other, x)
        assert moved.stride() == x.stride()
        assert moved.dtype == x.dtype
        assert torch.equal(moved, y)
