r"""Convolutions whose weight is trained: their gradients with fewer multiplications.

    y = conv(x, w) + b,    dw_oijc = sum over samples and pixels of dy_yxo x_(y+i-1)(x+j-1)c             (1)

The result is oneDNN's. The gradients, of weights of 3x3 with stride 1 and padding 1, are the library's. That of w is
Winograd's F(3x3, 2x2): for each tile of 2x2 pixels of dy and the 4x4 of x that it comes from

    dw = A^T ( sum over the tiles of (G dy G^T) * (B^T x B) ) A                                          (2)

takes 16 multiplications where (1) takes 36. That of x is a convolution of dy, by `winograd`'s F(2x2, 3x3) or,
in float32, F(4x4, 3x3).

In bfloat16 what is multiplied is rounded once more than in (1), and the sums of (2) are in float32 and stay so: alone,
dw is off by 4e-3 of itself and dx by 3.3e-3, where oneDNN's, rounded to bfloat16 in the end, are by 1.7e-3. The whole
gradient of a small U-Net is as near to float64's as with oneDNN's: what is rounded between the layers decides. In
float32 both are off by some 3e-6.

A gradient of the gradient goes by PyTorch's operators, and so does all else.

References:
    Fast Algorithms for Convolutional Neural Networks (Lavin & Gray, 2015), sections 4 and 5
    https://arxiv.org/abs/1509.09308
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import winograd
from reverie.kernels.attention import again
from reverie.kernels.dispatch import SUFFIX, call, fast, has, integers, pointer, widths
from reverie.kernels.norm import channels_last

Pair = tuple[int, int]
Image = Float[Tensor, "b i h w"]
Result = Float[Tensor, "b o h w"]

FEWEST = 16  # inputs: with fewer, the vectors are mostly empty
MOST = 2**16  # inputs times outputs: beyond, the sums of (2) are larger than the cache


def convolution(
    x: Image,
    weight: Float[Tensor, "o _ k l"],
    bias: Float[Tensor, " o"] | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> Float[Tensor, "b o h2 w2"]:
    """Convolve images, as torch.nn.functional.conv2d does; the gradient of the weight by (2), where that serves.

    Arguments:
        x: Images (B, I, H, W).
        weight: w (O, I, K, L).
        bias: One for each output.
        stride: Pixels from one result to the next.
        padding: Zeros around the image.

    Example:
        >>> convolution(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), padding=(1, 1))[0, 0].tolist()
        [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    if suitable(x, weight, bias, stride, padding):
        return Convolve.apply(x, weight, bias, arithmetic(x, weight))
    return F.conv2d(x, weight, bias, stride, padding)


def suitable(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> bool:
    """Whether the gradient of a weight is wanted, and better by (2), as for the layers of a small network."""
    if not (torch.is_grad_enabled() and weight.requires_grad and arithmetic(x, weight) in SUFFIX):
        return False
    outer, inner, *sides = weight.shape
    if sides != [3, 3] or tuple(stride) != (1, 1) or tuple(padding) != (1, 1):
        return False
    known = inner >= FEWEST and inner * outer <= MOST and channels_last(x) and x.shape[1] == inner
    return known and fast(x, weight, bias) and has(named(arithmetic(x, weight)))


def named(dtype: torch.dtype) -> str:
    """Return the name of the library's function for a dtype; that for bfloat16 is not in every library."""
    return f"reverie_weight_gradient{SUFFIX[dtype]}"


def arithmetic(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that images and weights are multiplied in here."""
    autocast = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if autocast else torch.promote_types(x.dtype, weight.dtype)


class Convolve(torch.autograd.Function):
    """A convolution in float32 or bfloat16, of 3x3 with stride 1 and padding 1, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dtype = dtype
        return convolved(dtype, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            there = (x, weight) if bias is None else (x, weight, bias)
            found = again(partial(convolved, ctx.dtype), there, dy)
            return (*found, *[None] * (4 - len(there)))
        dy, low = dy.contiguous(memory_format=torch.channels_last), x.to(ctx.dtype)
        dx = gradient_of_images(dy, low, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw, db = gradient_of_weight(low, dy)
        return dx, dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), None


def convolved(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (1), by casts of its own: autocast's are kept for the next who asks, and would have no gradient here."""
    return F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding=1)


def gradient_of_images(dy: Result, x: Image, weight: Float[Tensor, "o i 3 3"]) -> Image:
    """Return dx: dy convolved with the weight turned round, by `winograd` where that is faster.

    Arguments:
        dy: The gradient of the result, in channels-last.
        x: The images, of which the shape is looked at, in dy's dtype.
        weight: The weight, in the dtype that it is trained in.
    """
    outer, inner = weight.shape[:2]
    if tile := winograd.tile(outer, inner, dy.dtype, trained=True):
        return winograd.convolve(dy, winograd.transform(weight.flip(2, 3).transpose(0, 1), tile, dy.dtype), None)
    wanted = [True, False, False]
    settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)  # stride, padding, dilation, not transposed, groups
    return torch.ops.aten.convolution_backward(dy, x, weight.to(dy.dtype), None, *settings)[0]


def gradient_of_weight(x: Image, dy: Result) -> tuple[Float[Tensor, "o i 3 3"], Float[Tensor, " o"]]:
    """Return dw by (2) and db, in float32.

    Arguments:
        x: Images (B, I, H, W), in channels-last and in a dtype of the library's, as dy is.
        dy: The gradient of the result (B, O, H, W).
    """
    samples, inner, height, width = x.shape
    outer, threads = dy.shape[1], torch.get_num_threads()
    vector, _ = widths()
    wide, high = (-(-count // vector) * vector for count in (inner, outer))
    dw, db = torch.empty(threads, outer, 3, 3, wide), torch.empty(threads, high)
    shape = integers(samples, height, width, inner, outer)
    call(named(x.dtype), shape, *map(pointer, (x, dy, dw, db)))
    dw, db = dw.sum(0) if threads > 1 else dw[0], db.sum(0) if threads > 1 else db[0]
    return dw[..., :inner].permute(0, 3, 1, 2), db[:outer]
