"""Gated units in one pass are the formula."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.gate import gated, plain


def exact(x):
    return plain(x.double())


@given(st.integers(1, 5), st.sampled_from([1, 3, 8, 15, 16, 17, 40, 129]), st.sampled_from([1e-3, 1.0, 10.0, 1e4]))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_formula(level, rows, width, scale):
    x = scale * torch.randn(2, rows, 2 * width, generator=torch.Generator().manual_seed(rows))
    y = gated(x)
    assert y.shape == (2, rows, width)
    assert (y - exact(x)).abs().max() <= 1e-6 * exact(x).abs().max() + 2e-7 * scale * scale
    half = gated(x.bfloat16())
    wanted = exact(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - wanted).abs().max() <= 2**-8 * wanted.abs().max() + 2e-7 * scale * scale


def test_no_number_is_far_off(level):
    gate = torch.linspace(-12, 12, 20001)
    y = gated(torch.stack([torch.ones_like(gate), gate], 1))[:, 0]
    assert (y - torch.nn.functional.gelu(gate.double())).abs().max() < 1e-6


def test_not_a_number_and_the_ends(level):
    x = torch.tensor([[1.0, torch.nan], [torch.nan, 1.0], [2.0, torch.inf], [1.0, -1e30], [0.0, 5.0]])
    assert gated(x)[:2].isnan().all()
    assert gated(x)[2:, 0].tolist() == [torch.inf, 0.0, 0.0]


def test_any_strides_and_unaligned_memory(level):
    base = torch.randn(3, 7, 21)
    for x in (base[..., 1:], base[::2, :, 3:17], base[..., :20].transpose(0, 1)):
        torch.testing.assert_close(gated(x), plain(x), rtol=1e-6, atol=1e-6)


def test_nothing_and_gradients_are_pytorchs(level):
    assert gated(torch.zeros(2, 0, 8)).shape == (2, 0, 4)
    x = torch.randn(3, 8, requires_grad=True)
    assert torch.equal(torch.autograd.grad(gated(x).sum(), x)[0], torch.autograd.grad(plain(x).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_are_its_own_on_any_threads(level, dtype):
    x, before = torch.randn(9, 50).to(dtype), torch.get_num_threads()
    y = gated(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(gated(x), y)
        assert torch.equal(gated(x[4:5]), y[4:5])
    finally:
        torch.set_num_threads(before)
