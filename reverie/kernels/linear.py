r"""Linear layers on the fastest matrix product that PyTorch has for a processor.

    y = x W^T + b                                                                                       (1)

PyTorch multiplies float32 matrices by MKL, which leaves AVX-512 out on processors of other makers than its own; its
convolutions go to oneDNN, which does not. A 1x1 convolution is (1). On Intel's the two are equally fast within the
measurement's error (docs/kernels.md), and (1) stays a matrix product.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels.dispatch import mode, plain_memory, traced


def linear(
    x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "... o"]:
    """Multiply by a matrix and add a bias: equation (1).

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(1, 3)).tolist()
        [[3.0], [3.0]]
    """
    return convolution(x, weight, bias) if suitable(x, weight) else F.linear(x, weight, bias)


def convolution(
    x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "... o"]:
    """Equation (1) as a 1x1 convolution over an image of one row, in channels-last: no number is moved."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def suitable(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is better a convolution."""
    if not by_convolution() or mode() == "plain" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    same = x.dtype == weight.dtype == torch.float32 and plain_memory(x) and plain_memory(weight)
    return same and x.ndim > 2 and x.numel() > 0 and not traced()


@cache
def by_convolution(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has AVX-512 and is of another maker than MKL's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in cpuinfo.read_text()
    except OSError:
        return False
