"""The product of matrices as a convolution is the product of matrices."""

import sys

import pytest
import torch
import torch.nn.functional as F

from reverie.kernels.linear import by_convolution, convolution, linear, suitable

room = sys.modules[linear.__module__]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 64, 33), (2, 4, 5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_with_its_gradients(shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(7, shape[-1], requires_grad=True)
    inputs = [x, weight, *([torch.randn(7, requires_grad=True)] if bias else [])]
    y, wanted = convolution(*inputs), F.linear(*(t.double() for t in inputs))
    dy = torch.randn_like(y)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, inputs, dy.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tokens_in_any_strides():
    x = torch.randn(2, 5, 7, 3).permute(0, 2, 1, 3)
    weight = torch.randn(4, 3)
    torch.testing.assert_close(convolution(x, weight), F.linear(x, weight))


def test_what_is_no_matrix_of_tokens_is_pytorchs(monkeypatch):
    monkeypatch.setattr(room, "by_convolution", lambda: True)
    weight = torch.randn(4, 3)
    assert suitable(torch.randn(2, 5, 3), weight)
    for x in (torch.randn(5, 3), torch.randn(2, 0, 3), torch.randn(2, 5, 3).double()):
        assert not suitable(x, weight)
    monkeypatch.setenv("REVERIE_KERNELS", "plain")
    assert not suitable(torch.randn(2, 5, 3), weight)


@pytest.mark.parametrize(("maker", "capability", "chosen"), [
    ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_the_maker_decides(tmp_path, monkeypatch, maker, capability, chosen):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}\n")
    assert by_convolution.__wrapped__(tmp_path / "cpuinfo") is chosen
    assert not by_convolution.__wrapped__(tmp_path / "none")


def test_linear_is_the_one_or_the_other(monkeypatch):
    x, weight = torch.randn(2, 5, 3), torch.randn(4, 3)
    for convolved in (True, False):
        monkeypatch.setattr(room, "by_convolution", lambda convolved=convolved: convolved)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
