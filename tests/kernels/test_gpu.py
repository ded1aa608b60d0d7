"""Triton's kernels beside the twins in float64: on a GPU, or anywhere by Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from reverie.kernels import gate, gpu, norm
from reverie.kernels.layer_norm import layer_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or not (INTERPRETED or DEVICE == "cuda"), reason="needs Triton, and a GPU or its interpreter"
)


def image(shape, dtype, mean=30.0):
    """Return an image in channels-last, its mean far from zero."""
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + mean
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


def off(y, wanted):
    """Return the relative error."""
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "shape", [(2, 320, 9, 7), (1, 20, 3, 5), (2, 8, 1, 1), (2, 64, 40, 41), (1, 130, 6, 6), (2, 320, 64, 64)]
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("around", ["nothing", "added", "scaled"])
def test_group_norm_is_the_twin_in_float64(shape, dtype, most, around):
    x, groups = image(shape, dtype), 10 if shape[1] % 4 else 4
    torch.manual_seed(1)
    weight, bias = (torch.randn(shape[1], device=DEVICE) for _ in range(2))
    add, scale, shift = (torch.randn(shape[:2], device=DEVICE) for _ in range(3))
    scale, shift = (scale, shift) if around == "scaled" else (None, None)
    add = None if around == "nothing" else add
    for silu in (False, True):
        y = gpu.group_norm(x, groups, weight, bias, 1e-5, silu, scale, shift, add)
        wide = [None if part is None else part.double()[:, :, None, None] for part in (scale, shift, add)]
        wanted = norm.plain(x.double(), groups, weight.double(), bias.double(), 1e-5, "silu" if silu else None, *wide)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        # Of a group of two numbers near 30 their rounding, 2e-6, stands against a deviation that may be a tenth.
        assert off(y, wanted) < most


def test_a_sample_has_the_same_bits_in_any_batch():
    x = image((3, 48, 11, 6), torch.bfloat16)
    alone = gpu.group_norm(x[1:2], 4, None, None, 1e-5, True)
    assert torch.equal(gpu.group_norm(x, 4, None, None, 1e-5, True)[1:2], alone)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_gated_is_the_twin_in_float64(dtype):
    x = torch.randn(5, 7, 26, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    assert off(gpu.gated(x), gate.plain(x.double())) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("width", [320, 5, 1280])
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_layer_norm_is_the_twin_in_float64(dtype, width):
    x = (30 + torch.randn(3, 7, width, generator=torch.Generator().manual_seed(width))).to(DEVICE, dtype)
    weight, bias = torch.randn(2, width, device=DEVICE)
    wanted = layer_norm(x.double(), weight.double(), bias.double())
    assert off(gpu.layer_norm(x, weight, bias, 1e-5), wanted) < (2e-5 if dtype == torch.float32 else 5e-3)


def test_nan_stays_in_its_group():
    x = image((1, 8, 4, 4), torch.float32)
    x[0, 5, 1, 2] = float("nan")
    y = gpu.group_norm(x, 4, None, None, 1e-5, False)
    assert y[0, 4:6].isnan().all()
    assert y[0, [0, 1, 2, 3, 6, 7]].isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_they_serve_on_a_gpu_where_no_gradient_is_asked_for():
    x = image((1, 8, 4, 4), torch.float32)
    with torch.no_grad():
        assert gpu.serves(x)
    assert not gpu.serves(x.requires_grad_())
    assert not gpu.serves(x.detach().cpu())
