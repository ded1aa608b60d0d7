"""Each operator and layer against its formula, written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from reverie.networks.layers import (
    Downsample,
    Fourier,
    Places,
    ResidualBlock,
    Sinusoids,
    attention,
    crop,
    double,
    group_norm,
    halve,
    linear,
)
from reverie.networks.skip_blocks import fir_double, fir_halve


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("act", [None, "silu", "gelu", "mish", "relu"])
def test_group_norm(act):
    x, weight, bias = 3 + 2 * randn(2, 6, 4, 5), randn(6), randn(6)
    scale, shift = randn(2, 6, 1, 1), randn(2, 6, 1, 1) - 1
    groups = x.reshape(2, 3, -1)
    normal = (groups - groups.mean(-1, True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    plain = normal.reshape_as(x) * weight[:, None, None] + bias[:, None, None]
    activation = getattr(F, act) if act else (lambda y: y)
    torch.testing.assert_close(group_norm(x, 3, weight, bias, 1e-3, act), activation(plain))
    scaled = group_norm(x, 3, weight, bias, 1e-3, act, scale, shift)
    torch.testing.assert_close(scaled, activation(plain * (1 + scale) + shift))


def test_linear():
    x, weight, bias = randn(2, 3, 4), randn(5, 4), randn(5)
    torch.testing.assert_close(linear(x, weight, bias), torch.einsum("bni,oi->bno", x, weight) + bias)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention(heads):
    q, k, v = randn(2, 5, 12), randn(2, 7, 12), randn(2, 7, 12) + 1
    want = []
    for head in range(heads):
        part = slice(head * 12 // heads, (head + 1) * 12 // heads)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(12 // heads)
        want.append(scores.softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(q, k, v, heads), torch.cat(want, -1))


def test_half_precision_takes_the_float32_way_to_a_gradient():
    x = randn(2, 4, 6).bfloat16()
    weight, bias = torch.ones(4), torch.zeros(4)
    for operator in (lambda x: attention(x, x, x, 2), lambda x: group_norm(x, 2, weight, bias, 1e-5, "silu")):
        plain, differentiable = operator(x), operator(x.clone().requires_grad_())
        assert plain.dtype == differentiable.dtype == torch.bfloat16
        torch.testing.assert_close(differentiable.detach(), plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("width", "cos_first", "shift"), [(8, False, 0), (8, True, 1), (7, True, 0)])
def test_sinusoids(width, cos_first, shift):
    half = width // 2
    features = Sinusoids(width, cos_first, shift)(torch.tensor([0.0, 2.5, 999.0]))
    for row, t in zip(features, (0.0, 2.5, 999.0), strict=True):
        angles = [t * 10000 ** (-k / (half - shift)) for k in range(half)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        want = (cosines + sines if cos_first else sines + cosines) + [0.0] * (width % 2)
        torch.testing.assert_close(row, torch.tensor(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("log", [True, False])
def test_fourier_features(log):
    fourier = Fourier(5, scale=2.0, log=log)
    time = torch.tensor([0.3, 4.0])
    angle = 2 * math.pi * (time.log() if log else time)[:, None] * fourier.weight
    torch.testing.assert_close(fourier(time), torch.cat([angle.sin(), angle.cos()], 1), rtol=1e-4, atol=1e-4)
    assert not fourier.weight.requires_grad


def test_places():
    """Equation (6) at one pixel, and the same places whatever the size."""
    places = Places(3, 4).double()
    assert not places.told.weight.any()
    torch.nn.init.normal_(places.told.weight)
    row, column, height, width, emb = 2, 1, 4, 5, randn(2, 4)
    v, u = 2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1
    waves = [1.0]
    for a in (u, v):
        waves += [a, *(math.sin(math.pi * k * a) for k in (1, 2, 4)), *(math.cos(math.pi * k * a) for k in (1, 2, 4))]
    matrix = places.proj.weight + (places.told.weight @ emb[1]).reshape(3, 15)
    found = places(torch.zeros(2, 7, height, width), emb)
    assert found.shape == (2, 3, height, width)
    expected = matrix @ torch.tensor(waves, dtype=torch.float64)
    torch.testing.assert_close(found[1, :, row, column], expected, atol=1e-5, rtol=1e-5)
    large = places(torch.zeros(2, 1, 3 * height, 3 * width), emb)  # the middle of 3x3 pixels is the pixel
    torch.testing.assert_close(large[:, :, 1::3, 1::3], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4), (8, 8)])
@pytest.mark.parametrize("down", [halve, fir_halve, Downsample(3, 0).double(), Downsample(3, 1).double()])
def test_halving_rounds_up(down, size):
    x = randn(2, 3, *size)
    assert down(x).shape[2:] == tuple(-(-n // 2) for n in size)


def test_average_and_repetition():
    x = randn(1, 2, 3, 4)
    torch.testing.assert_close(halve(x)[0, :, 0, 1], x[0, :, :2, 2:].mean((1, 2)))
    torch.testing.assert_close(halve(x)[0, :, 1, 0], x[0, :, 2, :2].mean(1))
    assert torch.equal(double(x)[0, :, 5, 2], x[0, :, 2, 1])
    assert torch.equal(crop(double(x), randn(1, 1, 5, 7)), double(x)[..., :5, :7])


def test_filters():
    """Equation (1) of skip_blocks, along one line of pixels between two of zeros."""
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    line = randn(6)
    halved, doubled = torch.zeros(3).double(), torch.zeros(12).double()
    for i in range(6):
        for j, tap in enumerate(taps):
            if 0 <= 2 * i + j - 1 < 12:
                doubled[2 * i + j - 1] += 2 * tap * line[i]
            if i < 3 and 0 <= 2 * i + j - 1 < 6:
                halved[i] += tap * line[2 * i + j - 1]
    # Repeated along the other direction the filter does nothing, away from the border.
    image = line.expand(1, 1, 6, 6)
    torch.testing.assert_close(fir_halve(image)[0, 0, 1], halved)
    torch.testing.assert_close(fir_double(image)[0, 0, 5], doubled)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block(scale_shift):
    torch.manual_seed(0)
    block = ResidualBlock(4, 6, 5, groups=2, scale_shift=scale_shift, scale_out=1.5).double()
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = randn(2, 4, 5, 3), randn(2, 5)
    h = block.conv1(F.silu(block.norm1(x)))
    time = block.time_emb_proj(emb)[:, :, None, None]
    h = block.norm2(h) * (1 + time[:, :6]) + time[:, 6:] if scale_shift else block.norm2(h + time)
    want = (block.conv_shortcut(x) + block.conv2(F.silu(h))) / 1.5
    torch.testing.assert_close(block(x, emb), want)


def test_a_new_residual_block_is_its_shortcut():
    block = ResidualBlock(4, 4, 5, groups=2).double()
    x = randn(2, 4, 5, 3)
    assert torch.equal(block(x, randn(2, 5)), x)
