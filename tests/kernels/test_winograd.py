"""Convolutions with fewer multiplications, against plain ones in float64."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels import dispatch
from reverie.kernels.winograd import (
    DOUBLED,
    FEWEST,
    LEAST,
    MOST,
    convolve,
    matrices,
    plain,
    polynomial,
    tile,
    transform,
    unpacked,
)

# Relative, in the 2-norm. In bfloat16 inputs and weights are exact: what is lost is that of the transformed numbers.
SQUARE, WIDE, LARGE = (2, 2), (2, 4), (4, 4)
NEAR = {
    (DOUBLED, torch.float32): 1e-6,
    (DOUBLED, torch.bfloat16): 8e-3,
    (SQUARE, torch.float32): 1e-6,
    (LARGE, torch.float32): 4e-6,
    (SQUARE, torch.bfloat16): 8e-3,
    (WIDE, torch.bfloat16): 1e-2,
    (LARGE, torch.bfloat16): 1.6e-2,
}
KINDS = list(NEAR)
LAST = torch.channels_last


def drawn(samples, inner, outer, height, width, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inner, height, width, generator=draw).to(dtype)
    g = (torch.randn(outer, inner, 3, 3, generator=draw) / (9 * inner) ** 0.5).to(dtype).float()
    return x.contiguous(memory_format=LAST), g, torch.randn(outer, generator=draw)


def convolution(x, g, bias, sides, size=None):
    """The convolution in float64, of images that are doubled, and cut to a size, where the tile is for those."""
    x = x.double()
    if sides == DOUBLED:
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        x = F.interpolate(x, scale_factor=2.0)[:, :, :height, :width]
    return F.conv2d(x, g.double(), None if bias is None else bias.double(), padding=1)


def off(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.fixture
def kind(request, level):
    """A tile and a dtype that the library in use has."""
    sides, dtype = request.param
    if dtype == torch.bfloat16 and level != "avx512bf16":
        pytest.skip(f"{level} multiplies no bfloat16")
    return sides, dtype


@pytest.mark.parametrize("m", [2, 4])
def test_the_matrices_give_the_convolution(m):
    a, g, b = matrices(m)
    d, w = torch.randn(m + 2, m + 2).double(), torch.randn(3, 3).double()
    y = a @ ((g @ w @ g.T) * (b @ d @ b.T)) @ a.T
    torch.testing.assert_close(y, F.conv2d(d[None, None], w[None, None])[0, 0], rtol=1e-12, atol=1e-12)


def test_the_matrices_for_two_pixels_are_the_papers():
    a, g, b = (matrix.tolist() for matrix in matrices(2))
    assert g == [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert b[:3] == [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0]]
    assert a[0] == [1, 1, 1, 0]


def test_a_polynomial_is_zero_at_its_roots():
    assert polynomial([Fraction(1), Fraction(-2), Fraction(3)]) == [6, -5, -2, 1]


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.integers(0, 2**31),
)
def test_it_is_the_convolution(kind, samples, inner, outer, height, width, biased, cut, seed):
    sides, dtype = kind
    size = (2 * height - cut[0], 2 * width - cut[1]) if sides == DOUBLED else None
    x, g, bias = drawn(samples, inner, outer, height, width, dtype, seed)
    weight = transform(g, sides, dtype)
    bias = bias if biased else None
    y = convolve(x, weight, bias, size)
    wanted = convolution(x, g, bias, sides, size)
    # What numbers of this size add up to: the sum itself, and a weight's number in it, may be next to nothing.
    squares = g.double().square().mean((2, 3), keepdim=True).expand(g.shape)
    scale = convolution(x.double().square(), squares, None if bias is None else bias.square(), sides, size)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    for found in (y, plain(x, weight, bias, size)):
        assert float((found.double() - wanted).norm() / scale.sqrt().norm()) < NEAR[kind]


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_weights_are_transformed_as_the_formula_says(kind):
    sides, dtype = kind
    _, weight, _ = drawn(1, 37, 150, 1, 1, dtype)
    down, across = (matrices(side)[1] for side in sides)
    wanted = torch.einsum("pr,oirs,qs->pqio", down, weight.double(), across)
    found = transform(weight, sides, dtype)
    torch.testing.assert_close(
        unpacked(found), wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
    )
    assert found.numbers.numel() < 1.4 * wanted.numel()


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (30, 30)])
def test_a_sample_has_its_own_bits(kind, size, monkeypatch):
    """Whatever its batch, its place in it, and the threads."""
    sides, dtype = kind
    x, g, bias = drawn(9, 40, 96, *size, dtype)
    weight = transform(g, sides, dtype)
    wanted = convolve(x, weight, bias)
    for first, last in ((0, 1), (3, 8), (8, 9)):
        assert torch.equal(convolve(x[first:last], weight, bias), wanted[first:last])
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(transform(g, sides, dtype).numbers, weight.numbers)
        for count in (1, 5, 9):
            assert torch.equal(convolve(x[:count], weight, bias), wanted[:count])


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_images_in_any_layout(kind):
    sides, dtype = kind
    x, g, bias = drawn(2, 33, 40, 9, 6, dtype)
    weight = transform(g, sides, dtype)
    wanted = convolve(x, weight, bias)
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(2, 9, 6, 33).copy_(x.permute(0, 2, 3, 1))
    for other in (x.contiguous(), x.flip(3).flip(3), x.repeat(1, 2, 1, 1)[:, :33], shifted.permute(0, 3, 1, 2)):
        assert torch.equal(convolve(other, weight, bias), wanted)
    assert convolve(x[:0], weight, bias).shape == (0, 40, *wanted.shape[2:])


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_the_tiles_that_see_it(kind, bad):
    sides, dtype = kind
    x, g, bias = drawn(2, 32, 32, 16, 16, dtype)
    weight = transform(g, sides, dtype)
    wanted = convolve(x, weight, bias)
    x[0, 5, 8, 8] = bad  # in the middle: the tile of its own, and those above it and left of it
    y = convolve(x, weight, bias)
    scale = 2 if sides == DOUBLED else 1
    seen = slice(8 * scale - 1, 9 * scale + 1)
    assert not bool(y[0, :, seen, seen].isfinite().any())
    far = torch.ones(y.shape[2:], dtype=torch.bool)
    tall, broad = (slice(scale * (8 - side), scale * (8 + max(side, scale))) for side in sides)
    far[tall, broad] = False
    assert torch.equal(y[0][:, far], wanted[0][:, far])
    assert torch.equal(y[1], wanted[1])


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_large_and_small_numbers(kind):
    sides, dtype = kind
    x, g, _ = drawn(1, 32, 32, 8, 8, dtype)
    wanted = convolution(x, g, None, sides)
    for scale in (2.0**100, 2.0**-60):
        assert off(convolve(x * scale, transform(g, sides, dtype), None).double() / scale, wanted) < NEAR[kind]


def test_gradients_and_names_go_by_the_twin(level):
    x, g, bias = drawn(2, 32, 32, 6, 6, torch.float32)
    weight = transform(g, LARGE, torch.float32)
    x.requires_grad_()
    (found,) = torch.autograd.grad(convolve(x, weight, bias).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.conv2d(x, g, bias, padding=1).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    y = torch.func.vmap(lambda one: convolve(one[None], weight, bias)[0])(x.detach())
    torch.testing.assert_close(y, convolve(x.detach(), weight, bias), rtol=1e-4, atol=1e-5)


def test_the_rule_is_of_shape_and_dtype(level, monkeypatch):
    assert tile(FEWEST, FEWEST, torch.float32) == LARGE
    assert tile(FEWEST - 1, 64, torch.float32) is tile(64, FEWEST - 1, torch.bfloat16) is None
    assert tile(1280, 1280, torch.float32) == SQUARE
    assert 1280 * 1280 > MOST >= 1920 * 640
    assert tile(64, 64, torch.float64) is tile(8, 64, torch.float32, doubled=True) is None
    assert tile(64, 64, torch.float32, doubled=True) == tile(1280, 1280, torch.float32, doubled=True) == DOUBLED
    assert tile(64, 64, torch.bfloat16) == (WIDE if level == "avx512bf16" else None)
    half = {(320, 960): WIDE, (640, 640): LARGE, (1920, 640): LARGE, (1280, 1280): WIDE}
    for layer, sides in half.items():
        assert tile(*layer, torch.bfloat16) == (sides if level == "avx512bf16" else None)
    assert 320 * 960 < LEAST <= 640 * 640
    assert tile(640, 640, torch.bfloat16, trained=True) == (SQUARE if level == "avx512bf16" else None)
    assert tile(64, 64, torch.bfloat16, trained=True) == (SQUARE if level == "avx512bf16" else None)
    monkeypatch.setenv(dispatch.VARIABLE, "plain")
    assert tile(64, 64, torch.float32) is None


@pytest.mark.parametrize(("sides", "size"), [(DOUBLED, (7, 12)), (DOUBLED, (12, 13)), (SQUARE, (12, 12))])
def test_a_size_that_is_not_there_is_refused(sides, size, level):
    x, g, _ = drawn(1, 32, 32, 6, 6, torch.float32)
    weight = transform(g, sides, torch.float32)
    for function in (convolve, plain):
        with pytest.raises(AssertionError):
            function(x, weight, None, size)


def test_the_matrices_double_an_image():
    a, g, b = matrices(1)
    d, w = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    doubled = F.interpolate(d[None, None], scale_factor=2.0)[:, :, 1:-1, 1:-1]
    y = a @ ((g @ w @ g.T) * (b @ d @ b.T)) @ a.T
    torch.testing.assert_close(y, F.conv2d(doubled, w[None, None])[0, 0], rtol=1e-12, atol=1e-12)
