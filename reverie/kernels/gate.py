r"""Gated units in one pass: what a transformer's mlp has between its two matrices.

    y = h * gelu(g),    gelu(g) = g Phi(g), Phi the standard normal distribution function,                (1)

where h and g lie side by side, as one matrix gives them. The library computes it where no gradient is asked for, within
2e-7 of the largest value in float32; in bfloat16 it rounds once, and the twin three times. On a GPU it is Triton's.

References:
    GLU Variants Improve Transformer (Shazeer, 2020), equation 6
    https://arxiv.org/abs/2002.05202
"""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import gpu
from reverie.kernels.dispatch import call, fast, pointer


def gated(x: Float[Tensor, "... c2"]) -> Float[Tensor, "... c"]:
    """Return the first half of the channels, each times the gelu of its fellow in the second: equation (1).

    Arguments:
        x: Rows (..., 2 C).

    Example:
        >>> gated(torch.tensor([[3.0, 0.0]])).tolist()
        [[0.0]]
    """
    if x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return plain(x)
    if gpu.serves(x):
        return gpu.gated(x)
    if not fast(x):
        return plain(x)
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    sizes = ctypes.c_int64(y.numel() // width), ctypes.c_int64(width)
    call("reverie_gate", pointer(x), *sizes, pointer(y), int(x.dtype == torch.bfloat16))
    return y


def plain(x: Float[Tensor, "... c2"]) -> Float[Tensor, "... c"]:
    """The twin: the same by PyTorch."""
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)
