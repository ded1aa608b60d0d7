"""Convolutions with a trained weight: the library's gradients against float64, and when it is used."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.convolution import convolution

room = sys.modules[convolution.__module__]

SHAPES = st.tuples(
    st.integers(1, 5),  # samples: an odd number leaves half a word
    st.sampled_from([16, 17, 32, 40, 96]),  # inputs
    st.sampled_from([1, 3, 16, 33, 64]),  # outputs
    st.integers(1, 9),  # height
    st.integers(1, 9),  # width
)
# Relative, in the 2-norm: of the result, and of the gradients of images, weight and bias.
NEAR = {torch.bfloat16: (4e-3, 6e-3, 8e-3, 1e-6), torch.float32: (1e-6, 5e-6, 3e-6, 1e-6)}


def made(dtype, samples, inner, outer, height, width):
    """Images and their result's gradient in a dtype, weight and bias in float32, all of bfloat16's numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = (samples, inner, height, width), (outer, inner, 3, 3), (outer,), (samples, outer, height, width)
    x, weight, bias, dy = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    x, dy = (image.to(dtype).contiguous(memory_format=torch.channels_last) for image in (x, dy))
    return x.requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_(), dy


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def gradients(x, weight, bias, dy):
    with autocast(x.dtype):
        y = convolution(x, weight, bias, padding=(1, 1))
    return [y, *torch.autograd.grad(y, (x, weight, bias), dy)]


def exact(x, weight, bias, dy):
    double = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.conv2d(*double, padding=1)
    return [y, *torch.autograd.grad(y, double, dy.double())]


def error(found, wanted):
    wanted = wanted.detach().double()
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp(min=1))


@given(SHAPES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_convolution_with_its_gradients(dtype, shape):
    inputs = made(dtype, *shape)
    found, wanted = gradients(*inputs), exact(*inputs)
    assert type(found[0].grad_fn).__name__ == "ConvolveBackward"
    for a, b, most in zip(found, wanted, NEAR[dtype], strict=True):
        assert a.shape == b.shape
        assert error(a, b) < most
    assert [gradient.dtype for gradient in found[1:]] == [dtype, torch.float32, torch.float32]


def test_the_result_is_pytorchs_to_the_last_bit(dtype):
    x, weight, bias, _ = made(dtype, 4, 32, 32, 8, 8)
    with autocast(dtype):
        assert torch.equal(convolution(x, weight, bias, padding=(1, 1)), F.conv2d(x, weight, bias, padding=1))


def test_the_library_computes_the_gradient_once(dtype, monkeypatch):
    called = []
    monkeypatch.setattr(room, "call", lambda name, *arguments: called.append(name))
    gradients(*made(dtype, 2, 16, 16, 4, 4))
    assert called == [room.named(dtype)]


def test_gradients_of_images_do_not_depend_on_the_batch(dtype):
    x, weight, bias, dy = made(dtype, 5, 32, 32, 6, 6)
    alone = gradients(x[1:2].detach().requires_grad_(), weight, bias, dy[1:2])
    assert torch.equal(gradients(x, weight, bias, dy)[1][1:2], alone[1])


@pytest.mark.parametrize(
    "change", ["inputs", "stride", "padding", "side", "layout", "no gradient", "frozen", "float64"]
)
def test_what_is_left_to_pytorch(level, change):
    x, weight, bias, _ = made(torch.float32, 2, 8 if change == "inputs" else 16, 16, 4, 4)
    if change == "side":
        weight = weight.detach()[:, :, :1, :1].requires_grad_()
    if change == "frozen":
        weight = weight.detach()
    x = x.contiguous() if change == "layout" else x.double() if change == "float64" else x
    stride, padding = (2, 2) if change == "stride" else (1, 1), (0, 0) if change == "padding" else (1, 1)
    with torch.set_grad_enabled(change != "no gradient"):
        assert not room.suitable(x, weight, bias, stride, padding)
    assert room.suitable(*made(torch.float32, 2, 16, 16, 4, 4)[:3], (1, 1), (1, 1))


def test_a_gradient_of_the_gradient(dtype):
    x, weight, bias, dy = made(dtype, 2, 16, 16, 4, 4)
    dy.requires_grad_()
    found = []
    for convolve in (convolution, F.conv2d):
        with autocast(dtype):
            y = convolve(x, weight, bias, (1, 1), (1, 1))
        first = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        found.append(torch.autograd.grad(sum(one.float().square().sum() for one in first), (x, weight, dy)))
    for a, b in zip(*found, strict=True):
        assert error(a, b) < 8e-3


def test_threads_share_the_samples(dtype):
    inputs = made(dtype, 5, 32, 16, 6, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = gradients(*inputs)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, gradients(*inputs), strict=True):
        assert error(a, b) < 1e-5
