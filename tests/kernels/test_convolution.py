"""Convolutions with a trained weight: the library's gradient against float64, and when it is used."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.convolution import convolution
from reverie.kernels.dispatch import has

room = sys.modules[convolution.__module__]

SHAPES = st.tuples(
    st.integers(1, 5),  # samples: an odd number leaves half a word
    st.sampled_from([16, 17, 32, 40, 96]),  # inputs
    st.sampled_from([1, 3, 16, 33, 64]),  # outputs
    st.integers(1, 9),  # height
    st.integers(1, 9),  # width
)


@pytest.fixture
def bfloat16(level):
    if not has("reverie_weight_gradient_bfloat16"):
        pytest.skip("no products of bfloat16")


def made(samples, inner, outer, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (samples, inner, height, width), (outer, inner, 3, 3), (outer,), (samples, outer, height, width)
    x, weight, bias, dy = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    x, dy = (image.contiguous(memory_format=torch.channels_last) for image in (x, dy))
    return x.requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_(), dy


def gradients(x, weight, bias, dy):
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(x, weight, bias, padding=(1, 1))
    return [y, *torch.autograd.grad(y, (x, weight, bias), dy)]


def exact(x, weight, bias, dy):
    double = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.conv2d(*double, padding=1)
    return [y, *torch.autograd.grad(y, double, dy.double())]


def error(found, wanted):
    wanted = wanted.detach()
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp(min=1))


@given(SHAPES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_convolution_with_its_gradients(bfloat16, shape):
    inputs = made(*shape)
    found, wanted = gradients(*inputs), exact(*inputs)
    for a, b, most in zip(found, wanted, (4e-3, 6e-3, 8e-3, 1e-6), strict=True):
        assert a.shape == b.shape
        assert error(a, b) < most
    assert [gradient.dtype for gradient in found[1:]] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_result_is_pytorchs_to_the_last_bit(bfloat16):
    x, weight, bias, dy = made(4, 32, 32, 8, 8)
    y = gradients(x, weight, bias, dy)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv2d(x, weight, bias, padding=1)
    assert torch.equal(y, plain)


def test_the_library_computes_the_gradient_once(bfloat16, monkeypatch):
    called = []
    monkeypatch.setattr(room, "call", lambda name, *arguments: called.append(name))
    gradients(*made(2, 16, 16, 4, 4))
    assert called == ["reverie_weight_gradient_bfloat16"]


@pytest.mark.parametrize(
    "change", ["float32", "inputs", "stride", "padding", "side", "layout", "no gradient", "frozen"]
)
def test_what_is_left_to_pytorch(bfloat16, change):
    x, weight, bias, _ = made(2, 8 if change == "inputs" else 16, 16, 4, 4)
    if change == "side":
        weight = weight.detach()[:, :, :1, :1].requires_grad_()
    if change == "frozen":
        weight = weight.detach()
    x = x.contiguous() if change == "layout" else x
    stride, padding = (2, 2) if change == "stride" else (1, 1), (0, 0) if change == "padding" else (1, 1)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=change != "float32"),
        torch.set_grad_enabled(change != "no gradient"),
    ):
        assert not room.suitable(x, weight, bias, stride, padding)
    with torch.autocast("cpu", torch.bfloat16):
        assert room.suitable(*made(2, 16, 16, 4, 4)[:3], (1, 1), (1, 1))


def test_a_gradient_of_the_gradient(bfloat16):
    x, weight, bias, dy = made(2, 16, 16, 4, 4)
    dy.requires_grad_()
    for convolve in (convolution, F.conv2d):
        with torch.autocast("cpu", torch.bfloat16):
            y = convolve(x, weight, bias, (1, 1), (1, 1))
        first = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        second = torch.autograd.grad(sum(gradient.float().square().sum() for gradient in first), (x, weight, dy))
        if convolve is convolution:
            ours = second
    for a, b in zip(ours, second, strict=True):
        assert error(a, b.double()) < 8e-3


def test_threads_share_the_samples(bfloat16):
    x, weight, bias, dy = made(5, 32, 16, 6, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = gradients(x, weight, bias, dy)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, gradients(x, weight, bias, dy), strict=True):
        assert error(a, b.detach().double()) < 1e-5
