"""Linear layers with seven products for eight are the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from reverie.kernels import dispatch
from reverie.kernels.strassen import LEAST, halves, plain, product, serves, unpacked
from tests.kernels.test_panels import drawn, exact, of_all_shapes, off

# Relative, in the 2-norm, to a layer's size: what is lost as the sums are rounded.
NEAR = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


@of_all_shapes(40)
def test_it_is_the_formula(dtype, samples, tokens, inner, outer, biased, gated, seed):
    inner, outer = 4 * inner, 2 * outer if gated else outer
    x, weight, bias = drawn((samples, tokens), inner, outer, dtype, seed)
    bias = bias if biased else None
    layer = halves(weight, bias, dtype, gated)
    y, wanted = product(x, layer), exact(x, weight, bias, gated)
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    # What terms of this size add up to: the sum itself may be next to nothing.
    size = exact(x.square(), weight.square(), None if bias is None else bias.square(), False).sqrt()
    size = size.chunk(2, -1)[0] * size.chunk(2, -1)[1] if gated else size
    for found in (y, plain(x, layer)):
        assert float((found.double() - wanted).norm() / size.norm()) < NEAR[dtype]


@pytest.mark.parametrize(("tokens", "inner", "outer", "gated"), [(200, 1280, 320, False), (97, 1400, 200, True)])
def test_large_layers_are_the_formula(dtype, tokens, inner, outer, gated):
    """More pairs than a block has, and weights that do not stay in the cache."""
    x, weight, bias = drawn((2, tokens), inner, outer, dtype)
    y, wanted = product(x, halves(weight, bias, dtype, gated)), exact(x, weight, bias, gated)
    assert off(y, wanted) < {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outer", [2, 34, 64, 130, 200])
def test_what_is_multiplied_are_the_sums_of_the_weight(dtype, outer, gated):
    _, weight, _ = drawn((1,), 12, outer, dtype)
    layer = halves(weight, None, dtype, gated)
    columns = len(layer.bias) // 2
    first = outer // 2 if gated else columns
    left, right = (F.pad(rows, (0, 0, 0, columns - len(rows))) for rows in (weight[:first], weight[first:]))
    (b11, b21), (b12, b22) = ([half.T.float() for half in rows.chunk(2, 1)] for rows in (left, right))
    t1 = b12 - b11
    t2 = b22 - t1
    for found, wanted in zip(unpacked(layer), (b11, b21, t2, b22 - b12, b21 - t2, t1, b22), strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_a_sample_has_its_own_bits(dtype, gated, monkeypatch):
    """Whatever its batch, its place in it, and the threads."""
    x, weight, bias = drawn((9, 31), 1400, 136, dtype)
    layer = halves(weight, bias, dtype, gated)
    wanted = product(x, layer)
    for first, last in ((0, 1), (3, 8), (8, 9)):
        assert torch.equal(product(x[first:last], layer), wanted[first:last])
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(halves(weight, bias, dtype, gated).numbers, layer.numbers)
        for count in (1, 2, 9):
            assert torch.equal(product(x[:count], layer), wanted[:count])


def test_rows_without_a_sample_go_alone(dtype):
    x, weight, bias = drawn((5,), 64, 40, dtype)
    layer = halves(weight, bias, dtype)
    assert torch.equal(product(x, layer), product(x[:, None], layer)[:, 0])
    assert torch.equal(product(x[2], layer), product(x, layer)[2])


def test_rows_in_any_strides_and_none_at_all(dtype):
    x, weight, bias = drawn((3, 5), 32, 40, dtype)
    layer = halves(weight, bias, dtype)
    wanted = product(x, layer)
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    for other in (shifted, x.repeat(1, 1, 2)[..., :32], x.mT.contiguous().mT):
        assert torch.equal(product(other, layer), wanted)
    assert product(x[:, :0], layer).shape == (3, 0, 40)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_pair_of_rows(dtype, bad, gated):
    x, weight, bias = drawn((2, 13), 32, 80, dtype)
    layer = halves(weight.abs(), bias, dtype, gated)
    wanted = product(x, layer)
    x[1, 5, 3] = bad
    y = product(x, layer)
    assert not bool(y[1, 5].isfinite().any())
    y[1, 5], y[1, 12] = wanted[1, 5], wanted[1, 12]
    assert torch.equal(y, wanted)


def test_gradients_and_names_go_by_the_twin(level):
    x, weight, bias = drawn((4, 7), 16, 24, torch.float32)
    layer = halves(weight, bias, torch.float32, gated=True)
    x.requires_grad_()
    (found,) = torch.autograd.grad(product(x[None], layer).square().sum(), x)
    (wanted,) = torch.autograd.grad(exact(x, weight, bias, True).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    samples = x.detach().view(2, 2, 7, 16)
    y = torch.func.vmap(lambda one: product(one, layer))(samples)
    torch.testing.assert_close(y, product(samples, layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 4, 3), (13, 40, 64), (29, 36, 130), (200, 320, 70)])
def test_a_layer_is_added_to_what_there_is(dtype, rows, inner, outer):
    x, weight, bias = drawn((2, rows), inner, outer, dtype)
    layer, z = halves(weight, bias, dtype), torch.randn(2, rows, outer).to(dtype)
    wanted = exact(x, weight, bias, False) + z.double()
    for found in (product(x, layer, z), plain(x, layer, z), product(x, layer, z.mT.contiguous().mT)):
        assert found.dtype == dtype
        assert off(found, wanted) < NEAR[dtype]


def test_the_rule_is_of_shape_and_dtype(level, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert serves(4 * LEAST, LEAST, torch.float32)
    assert serves(LEAST // 2, 8, torch.float32, gated=True)
    assert not serves(LEAST // 4, 8, torch.float32, gated=True)
    assert not serves(4 * LEAST, 2 * LEAST, torch.float32)
    assert not serves(4 * LEAST, LEAST, torch.float64)
    assert not serves(4 * LEAST + 2, LEAST, torch.bfloat16)
    assert serves(4 * LEAST, LEAST, torch.bfloat16) == (level == "avx512bf16")
    monkeypatch.setenv(dispatch.VARIABLE, "plain")
    assert not serves(4 * LEAST, LEAST, torch.float32)
