r"""Products with weights that no longer change: laid out once as the processor wants them, or held in eight bits.

    y = x W^T + b,    or the convolution of x with W                                                     (1)
    W ~ s_o Q,    s_o = max_i |W_oi| / 127,    Q = round(W / s_o) in -127 .. 127                             (2)

oneDNN multiplies by blocks of a weight, and brings a plain one into blocks at every call. Here that is done once, and
the plain weight can go: the numbers of y are the same. Eight bits (2), a scale for each output, are a quarter of
float32; the product makes W of them each time, which is less time than it takes to multiply.

The twin, where there is no oneDNN: plain weights and PyTorch's operators.

References:
    oneDNN, memory format propagation
    https://uxlfoundation.github.io/oneDNN/page_memory_format_propagation_cpp.html
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from reverie.kernels.dispatch import mode

Pair = tuple[int, int]


class Eight(NamedTuple):
    """A weight in eight bits: (2).

    Arguments:
        numbers: Q, of the weight's shape.
        scale: s, one for each output, in the dtype that W is made in.
    """

    numbers: Int8[Tensor, "o ..."]
    scale: Float[Tensor, " o"]

    def full(self) -> Float[Tensor, "o ..."]:
        """Return W."""
        return self.numbers.to(self.scale.dtype).mul_(self.scale.view(-1, *[1] * (self.numbers.ndim - 1)))


def eight(weight: Float[Tensor, "o ..."], dtype: torch.dtype) -> Eight:
    """Return a weight in eight bits, to be made in some dtype: (2).

    Example:
        >>> eight(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.float32).numbers.tolist()
        [[64, -127], [127, 0]]
    """
    scale = (weight.flatten(1).abs().amax(1).float() / 127).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
    wide = scale.float().view(-1, *[1] * (weight.ndim - 1))
    return Eight((weight.float() / wide).round().clamp(-127, 127).to(torch.int8), scale)


@cache
def packs() -> bool:
    """Whether oneDNN takes weights that are laid out already, and gives the same: tried once.

    Raises:
        UsageError: REVERIE_KERNELS is not one of its words.
    """
    if not torch.backends.mkldnn.is_available() or mode() == "plain":
        return False
    x, w = torch.linspace(-1, 1, 6 * 32).view(1, 6, 32), torch.linspace(1, -1, 16 * 32).view(16, 32)
    image, kernel = x.view(1, 2, 12, 8), w.view(16, 2, 4, 4)[:, :, :3, :3].contiguous()
    try:
        y = multiply(x, blocks(w), None)
        z = convolve(image, blocks_of_convolution(kernel, (1, 1), (1, 1)), None, (1, 1), (1, 1))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(y, F.linear(x, w), 1e-4, 1e-4) and torch.allclose(
        z, F.conv2d(image, kernel, padding=1), 1e-4, 1e-4
    )


def blocks(weight: Float[Tensor, "o i"]) -> Tensor:
    """Return a matrix in oneDNN's blocks."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def blocks_of_convolution(weight: Float[Tensor, "o i h w"], stride: Pair, padding: Pair) -> Tensor:
    """Return a convolution's weight in oneDNN's blocks."""
    plain = weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, padding, stride, (1, 1), 1, None)  # type: ignore[call-arg, arg-type]


def multiply(x: Float[Tensor, "... i"], weight: Tensor, bias: Float[Tensor, " o"] | None) -> Float[Tensor, "... o"]:
    """Return x W^T + b, of a matrix that may be in blocks.

    Example:
        >>> multiply(torch.ones(2, 3), torch.ones(1, 3), None).tolist()
        [[3.0], [3.0]]
    """
    if weight.layout is torch.strided:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def convolve(
    x: Float[Tensor, "b i h w"], weight: Tensor, bias: Float[Tensor, " o"] | None, stride: Pair, padding: Pair
) -> Float[Tensor, "b o h2 w2"]:
    """Return the convolution of images, with a weight that may be in blocks.

    Arguments:
        x: Images (B, I, H, W).
        weight: The weight (O, I, kh, kw), or its blocks.
        bias: One for each output.
        stride, padding: The convolution's.
    """
    if weight.layout is torch.strided:
        return F.conv2d(x, weight, bias, stride, padding)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, (1, 1), 1, "none", [], "")
