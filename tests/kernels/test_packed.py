"""Packed weights give what plain ones give; eight bits are as near as they can be."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.kernels import packed
from reverie.kernels.packed import blocks, blocks_of_convolution, convolve, eight, multiply, packs

needs_blocks = pytest.mark.skipif(not packs(), reason="oneDNN takes no packed weights here")
near = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def off(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@needs_blocks
@pytest.mark.parametrize("dtype", list(near))
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_a_packed_matrix_is_the_matrix(dtype, rows, inner, outer, biased, seed):
    draw = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(shape, generator=draw).to(dtype) for shape in ((2, rows, inner), (outer, inner), (outer,)))
    wanted = F.linear(x.double(), w.double(), b.double() if biased else None)
    assert off(multiply(x, blocks(w), b if biased else None), wanted) < near[dtype]


@needs_blocks
@pytest.mark.parametrize("dtype", list(near))
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 2), (0, 0))])
@pytest.mark.parametrize(("inner", "outer", "size"), [(3, 5, 9), (32, 64, 8), (64, 32, 13)])
def test_a_packed_convolution_is_the_convolution(dtype, stride, padding, inner, outer, size):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, inner, size, size, generator=draw).to(dtype).to(memory_format=torch.channels_last)
    w, b = torch.randn(outer, inner, 3, 3, generator=draw).to(dtype), torch.randn(outer, generator=draw).to(dtype)
    y = convolve(x, blocks_of_convolution(w, stride, padding), b, stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert off(y, F.conv2d(x.double(), w.double(), b.double(), stride, padding)) < near[dtype]


def test_plain_weights_go_by_pytorch():
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    assert torch.equal(multiply(x, w, None), F.linear(x, w))
    image, kernel = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    assert torch.equal(convolve(image, kernel, None, (1, 1), (1, 1)), F.conv2d(image, kernel, padding=1))


def test_nothing_is_packed_where_plain_operators_are_asked_for(monkeypatch):
    monkeypatch.setenv("REVERIE_KERNELS", "plain")
    packed.packs.cache_clear()
    try:
        assert not packs()
    finally:
        monkeypatch.undo()
        packed.packs.cache_clear()


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 3, 3), (1, 1)])
def test_eight_bits_are_off_by_half_a_step_at_most(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    held = eight(w, torch.float32)
    step = w.flatten(1).abs().amax(1) / 127
    assert torch.allclose(held.scale, step)
    assert bool(((held.full() - w).flatten(1).abs() <= 0.501 * step[:, None]).all())
    assert held.numbers.dtype == torch.int8


def test_a_row_of_zeros_stays_zero():
    w = torch.zeros(2, 3)
    w[1, 1] = -4
    assert torch.equal(eight(w, torch.float32).full(), w)
