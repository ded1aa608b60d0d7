r"""Norms and gated units on a GPU, each in as few walks over memory as there must be, in Triton.

    mu, M2 of a block of n pixels, for each channel; of a group,  mu = sum n_i mu_i / N,
    var = sum (M2_i + n_i (mu_i - mu)^2) / N                                                                         (1)
    y = act(x A + B),    A = a (1 + scale),    B = (b + (add - mu) a) (1 + scale) + shift,    a = w / sqrt(var + eps)(2)

PyTorch's group norm turns an image in channels-last around and back, and knows nothing of the activation, nor of what
is added before or scales after it. Here x is read twice and y written once; where a group is small enough to be held, x
is read once. The sums are those of Chan et al., in float32, in an order that depends on the image's size alone: a
sample's bits are its own.

Triton comes with PyTorch for NVIDIA's and AMD's GPUs; without it, and where a gradient is asked for, the twins of
`reverie.kernels.norm` and `reverie.kernels.gate` serve.

References:
    Algorithms for computing the sample variance (Chan, Golub & LeVeque, 1979): block by block
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.kernels.dispatch import VARIABLE, mode, traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIXELS, CHANNELS, ROWS = 32, 128, 32  # a block's, and how many blocks' sums are taken up at once
HELD = 2**15  # numbers of a group that one program holds
TOKENS = 4096  # numbers of the rows that one program holds
NUMBERS = 1024  # of a block of gated units


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def capable(device: torch.device) -> bool:
    """Whether Triton compiles for a GPU: NVIDIA's from Volta on, and AMD's."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)


def status() -> str:
    """Return what serves norms and gated units on a GPU, in words.

    Example:
        >>> status().split()[0] in ("ours,", "PyTorch")
        True
    """
    if mode() == "plain":
        return f"PyTorch ({VARIABLE}=plain)"
    return "ours, Triton" if has_triton() else "PyTorch (no Triton here)"


def serves(*tensors: Tensor | None) -> bool:
    """Whether these kernels may serve a call with these tensors: all on a GPU, and no gradient asked for."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in given):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    if not given or not has_triton() or mode() == "plain" or torch.compiler.is_compiling() or traced():
        return False
    return capable(given[0].device)


@cache
def kernels() -> Any:
    """Return the module of the kernels, which needs Triton to be imported."""
    from reverie.kernels import triton_kernels

    return triton_kernels


def group_norm(
    x: Float[Tensor, "b c h w"],
    groups: int,
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    eps: float,
    silu: bool,
    scale: Float[Tensor, "b c"] | None = None,
    shift: Float[Tensor, "b c"] | None = None,
    add: Float[Tensor, "b c"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Return the group norm of images in channels-last, with what stands around it: equations (1) and (2).

    Arguments:
        x: Images (B, C, H, W), channels innermost, not empty.
        groups: Groups of channels; their number divides the channels.
        weight, bias: One for each channel; None for 1 and 0.
        eps: What is added to a variance.
        silu: Whether the activation is SiLU; else there is none.
        scale, shift: One for each sample and channel (B, C); both or none.
        add: What is added to x before all (B, C).
    """
    batch, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    y, held = torch.empty_like(x), power(pixels) * power(each)
    if held <= HELD:
        parts = (None if part is None else part.contiguous() for part in (weight, bias, scale, shift, add))
        kernels().whole[(groups, batch)](
            x, *parts, y, pixels, channels, each, eps, SILU=silu, PIXELS=power(pixels), WIDTH=power(each),
            num_warps=min(max(held // 2048, 4), 16),
        )  # fmt: skip
        return y
    blocks, columns = -(-pixels // PIXELS), -(-channels // CHANNELS)
    weight, bias, scale, shift, add = (
        None if part is None else part.contiguous() for part in (weight, bias, scale, shift, add)
    )
    means, squares = (x.new_empty(batch, blocks, channels, dtype=torch.float32) for _ in range(2))
    slopes, offsets = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
    found, grid = kernels(), (blocks, columns, batch)
    found.moments[grid](x, add, means, squares, pixels, channels, PIXELS=PIXELS, CHANNELS=CHANNELS)
    found.lines[(groups, batch)](
        means, squares, weight, bias, scale, shift, add, slopes, offsets, pixels, channels, each, eps,
        BLOCKS=blocks, PIXELS=PIXELS, ROWS=ROWS, WIDTH=power(each),
    )  # fmt: skip
    found.apply[grid](x, slopes, offsets, y, pixels, channels, SILU=silu, PIXELS=PIXELS, CHANNELS=CHANNELS)
    return y


def power(n: int) -> int:
    """Return the least power of two that is not below n.

    Example:
        >>> power(20), power(32)
        (32, 32)
    """
    return 1 << (n - 1).bit_length()


def layer_norm(
    x: Float[Tensor, "... c"], weight: Float[Tensor, " c"] | None, bias: Float[Tensor, " c"] | None, eps: float
) -> Float[Tensor, "... c"]:
    """Return the layer norm of rows, of x's dtype whatever that of the weights."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rows, wide = x.numel() // width, power(width)
    many = max(TOKENS // wide, 1)
    kernels().layer[(-(-rows // many),)](x, weight, bias, y, rows, width, eps, ROWS=many, WIDTH=wide)
    return y


def gated(x: Float[Tensor, "... c2"]) -> Float[Tensor, "... c"]:
    """Return the first half of the channels, each times the gelu of its fellow in the second."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    kernels().gate[(-(-y.numel() // NUMBERS),)](x, y, y.numel(), width, NUMBERS=NUMBERS)
    return y
