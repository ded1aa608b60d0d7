"""Linear layers in panels, and gated units in the same walk, are the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels import dispatch
from reverie.kernels.panels import panels, plain, product, serves, unpacked

# Relative, in the 2-norm: what is lost as y is rounded, once.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3}


def drawn(rows, inner, outer, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, inner, generator=draw).to(dtype)
    weight = (torch.randn(outer, inner, generator=draw) / inner**0.5).to(dtype)
    return x, weight, torch.randn(outer, generator=draw)


def of_all_shapes(inner):
    """Have a test run with samples, tokens, inner up to so many, outer, biased, gated and a seed."""
    small = {"deadline": None, "max_examples": 40, "derandomize": True}
    ints = [st.integers(1, most) for most in (3, 40, inner, 150)]
    drawn_by = given(*ints, st.booleans(), st.booleans(), st.integers(0, 2**31))
    return lambda test: settings(suppress_health_check=[HealthCheck.function_scoped_fixture], **small)(drawn_by(test))


def exact(x, weight, bias, gated):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y.chunk(2, -1)[0] * F.gelu(y.chunk(2, -1)[1]) if gated else y


def off(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@of_all_shapes(70)
def test_it_is_the_formula(dtype, samples, tokens, inner, outer, biased, gated, seed):
    inner, outer = 2 * inner, 2 * outer if gated else outer
    x, weight, bias = drawn((samples, tokens), inner, outer, dtype, seed)
    bias = bias if biased else None
    layer = panels(weight, bias, dtype, gated)
    y, wanted = product(x, layer), exact(x, weight, bias, gated)
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    assert off(y, wanted) < NEAR[dtype]
    assert off(plain(x, layer), wanted) < NEAR[dtype]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outer", [2, 34, 64, 130, 200])
def test_a_layer_comes_back_as_it_was(dtype, outer, gated):
    _, weight, bias = drawn((1,), 6, outer, dtype)
    found = unpacked(panels(weight, bias, dtype, gated))
    assert torch.equal(found[0], weight)
    assert torch.equal(found[1], bias)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_its_own_bits(dtype, gated, monkeypatch):
    """Whatever its batch, its place in it, and the threads."""
    x, weight, bias = drawn((41,), 4000, 136, dtype)
    layer = panels(weight, bias, dtype, gated)
    wanted = product(x, layer)
    for first, last in ((0, 1), (5, 18), (40, 41)):
        assert torch.equal(product(x[first:last], layer), wanted[first:last])
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for count in (1, 2, 20, 41):
            assert torch.equal(product(x[:count], layer), wanted[:count])


def test_rows_in_any_strides_and_none_at_all(dtype):
    x, weight, bias = drawn((3, 5), 32, 40, dtype)
    layer = panels(weight, bias, dtype)
    wanted = product(x, layer)
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    for other in (shifted, x.repeat(1, 1, 2)[..., :32], x.mT.contiguous().mT):
        assert torch.equal(product(other, layer), wanted)
    assert product(x[:, :0], layer).shape == (3, 0, 40)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(dtype, bad, gated):
    x, weight, bias = drawn((13,), 32, 80, dtype)
    layer = panels(weight.abs(), bias, dtype, gated)
    wanted = product(x, layer)
    x[5, 3] = bad
    y = product(x, layer)
    assert not bool(y[5].isfinite().any())
    y[5] = wanted[5]
    assert torch.equal(y, wanted)


def test_gradients_and_names_go_by_the_twin(level):
    x, weight, bias = drawn((4, 7), 16, 24, torch.float32)
    layer = panels(weight, bias, torch.float32, gated=True)
    x.requires_grad_()
    (found,) = torch.autograd.grad(product(x, layer).square().sum(), x)
    (wanted,) = torch.autograd.grad(exact(x, weight, bias, True).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    y = torch.func.vmap(lambda one: product(one, layer))(x.detach())
    torch.testing.assert_close(y, product(x.detach(), layer), rtol=1e-4, atol=1e-5)


def test_the_rule_is_of_inputs_and_dtype(level, monkeypatch):
    assert serves(3, torch.float32)
    assert not serves(3, torch.bfloat16)
    assert not serves(4, torch.float64)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert serves(4, torch.bfloat16) == (level == "avx512bf16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not serves(4, torch.bfloat16)
    monkeypatch.setenv(dispatch.VARIABLE, "plain")
    assert not serves(4, torch.float32)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 2, 3), (13, 40, 64), (29, 34, 130), (200, 320, 70)])
def test_a_layer_is_added_to_what_there_is_and_rounded_once(dtype, rows, inner, outer):
    x, weight, bias = drawn((rows,), inner, outer, dtype)
    layer, z = panels(weight, bias, dtype), torch.randn(rows, outer).to(dtype)
    wanted = exact(x, weight, bias, False) + z.double()
    for found in (product(x, layer, z), plain(x, layer, z), product(x, layer, z.T.contiguous().T)):
        assert found.dtype == dtype
        assert off(found, wanted) < NEAR[dtype]
    assert torch.equal(product(x[-1:], layer, z[-1:]), product(x, layer, z)[-1:])
    assert torch.equal(product(x, layer, z[:1]), product(x, layer, z[:1].expand_as(z)))  # never read beyond its end
    assert off(product(x, layer, z.double()), wanted) < NEAR[dtype]
    with pytest.raises(RuntimeError, match="expand"):
        product(x, layer, torch.zeros(rows + 1, outer, dtype=dtype))


def test_the_gradient_of_what_is_added_to_is_the_twins(level):
    x, weight, bias = drawn((5,), 4, 6, torch.float32)
    z = torch.zeros(5, 6, requires_grad=True)
    product(x, panels(weight, bias, torch.float32), z).sum().backward()
    assert torch.equal(z.grad, torch.ones(5, 6))
