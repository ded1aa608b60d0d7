r"""Convolutions of 3x3, of stride 1 and padding 1, with fewer multiplications, for weights that no longer change.

    y = A^T ( sum_i (G g_i G^T) * (B^T d_i B) ) A                                                       (1)

for each tile of m x m pixels, made of the (m + 2) x (m + 2) that it sees of each input i: m = 2 takes 16
multiplications where a plain convolution takes 36, and m = 4 takes 36 where it takes 144. G g G^T is worked out once,
in float64. The matrices are those of polynomials at m + 1 points and infinity,

    A^T = [ p^k ],    G = [ p^k / prod_q (p - q) ],    B^T from prod_q (x - q) / (x - p),                    (2)

at 0, 1, -1 for m = 2, and at 0, 1/2, -1/2, 2, -2 for m = 4, which lose less than the usual 0, 1, -1, 2, -2.

What it costs. The weights take (m + 2)^2 / 9 times as much: 1.8 for m = 2, 4 for m = 4. The transformed numbers are
rounded to bfloat16 where that is the dtype: with m = 2 a result is off by 3.3e-3 where a plain convolution is by 1.7e-3
(relative, of weights and images that are exact), with m = 4 by 1.2e-2, which is too much. In float32 the error is some
3e-7 and 2e-6. A NaN or an infinity makes NaN of the tiles that see it, not only of the pixels that do.

Which m serves a layer is decided by its numbers of inputs and outputs alone (`tile`), so that a sample's bits depend
neither on the batch nor on the threads: they are sums over the inputs in their order.

References:
    Fast Algorithms for Convolutional Neural Networks (Lavin & Gray, 2015), equations 8 to 12
    https://arxiv.org/abs/1509.09308
"""

import ctypes
from fractions import Fraction
from functools import cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels.dispatch import SUFFIX, call, fast, has, integers, pointer, widths

POINTS = {2: (0, 1, -1), 4: (0, Fraction(1, 2), Fraction(-1, 2), 2, -2)}
FEWEST = 32  # inputs and outputs: with fewer, the transforms take what is saved
MOST = 3 * 2**19  # inputs times outputs, with m = 4: its weights take 36 numbers for each, 216 MiB


class Transformed(NamedTuple):
    """A weight as (1) multiplies by it.

    Arguments:
        numbers: G g G^T, in panels of outputs, as csrc/winograd.h reads them.
        m: Pixels of a tile's side.
        inner, outer: The numbers of inputs and outputs.
    """

    numbers: Float[Tensor, " n"]
    m: int
    inner: int
    outer: int


@cache
def matrices(m: int) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n r"], Float[Tensor, "n n"]]:
    """Return A^T, G and B^T in float64: (2).

    Example:
        >>> matrices(2)[2].tolist()[0]
        [1.0, 0.0, -1.0, 0.0]
    """
    points = [Fraction(point) for point in POINTS[m]]
    others = [[q for q in points if q != p] for p in points]
    scales = [prod([p - q for q in rest], start=Fraction(1)) for p, rest in zip(points, others, strict=True)]
    after = [[*(p**k for p in points), Fraction(k == m - 1)] for k in range(m)]
    weight = [[p**k / scale for k in range(3)] for p, scale in zip(points, scales, strict=True)]
    before = [[*polynomial(rest), Fraction(0)] for rest in others]
    if scales[0] < 0:  # the paper's signs: B^T begins with a number above 0
        weight[0], before[0] = [-x for x in weight[0]], [-x for x in before[0]]
    weight.append([Fraction(0), Fraction(0), Fraction(1)])
    before.append(polynomial(points))
    return floats(after), floats(weight), floats(before)


def floats(matrix: list[list[Fraction]]) -> Float[Tensor, "m n"]:
    """Return a matrix in float64."""
    return torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)


def polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Return the coefficients of prod_q (x - q), the constant first."""
    found = [Fraction(1)]
    for q in roots:
        found = [low - q * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def tile(inner: int, outer: int, dtype: torch.dtype) -> int:
    """Return the m that serves a convolution best here, or 0 where a plain one does.

    Example:
        >>> tile(3, 64, torch.float32)
        0
    """
    if min(inner, outer) < FEWEST or dtype not in SUFFIX:
        return 0
    m = 4 if dtype == torch.float32 and inner * outer <= MOST else 2
    return m if fast() and has(f"reverie_winograd{m}{SUFFIX[dtype]}") else 0


def transform(weight: Float[Tensor, "o i h w"], m: int, dtype: torch.dtype) -> Transformed:
    """Return a weight of 3x3 as (1) multiplies by it, rounded once to a dtype.

    Arguments:
        weight: g (O, I, 3, 3).
        m: Pixels of a tile's side, as `tile` has it.
        dtype: That of the images.
    """
    outer, inner = weight.shape[:2]
    vector, _ = widths()
    wide = -(-outer // vector) * vector
    numbers = torch.empty((m + 2) ** 2 * padded(inner, dtype) * wide, dtype=dtype)
    plain = weight.detach().float().contiguous()
    sizes = ctypes.c_int64(outer), ctypes.c_int64(inner)
    call(f"reverie_winograd{m}_weights{SUFFIX[dtype]}", pointer(plain), *sizes, pointer(numbers))
    return Transformed(numbers, m, inner, outer)


def padded(inner: int, dtype: torch.dtype) -> int:
    """Return the numbers in a row: in bfloat16 they go in pairs."""
    return inner + inner % 2 if dtype == torch.bfloat16 else inner


def convolve(
    x: Float[Tensor, "b i h w"], weight: Transformed, bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "b o h w"]:
    """Return the convolution of images: (1).

    Arguments:
        x: Images (B, I, H, W) of the weight's dtype, of any size and in any layout; those in channels-last are read as
            they are.
        weight: The weight.
        bias: One for each output, in float32.
    """
    if (x.requires_grad and torch.is_grad_enabled()) or not fast(x) or x.dtype != weight.numbers.dtype:
        return plain(x, weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    samples, inner, height, width = x.shape
    y = torch.empty(samples, weight.outer, height, width, dtype=x.dtype, memory_format=torch.channels_last)
    if y.numel():
        shape = integers(samples, height, width, inner, weight.outer)
        arrays = pointer(x), pointer(weight.numbers), pointer(bias), pointer(y)
        call(f"reverie_winograd{weight.m}{SUFFIX[x.dtype]}", shape, *arrays)
    return y


def plain(
    x: Float[Tensor, "b i h w"], weight: Transformed, bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "b o h w"]:
    """The twin: (1) by PyTorch, for what the library can't be given."""
    m, (height, width) = weight.m, x.shape[2:]
    after, _, before = (matrix.float() for matrix in matrices(m))
    high, wide = -(-height // m), -(-width // m)
    tiles = (
        F.pad(x.float(), (1, wide * m + 1 - width, 1, high * m + 1 - height)).unfold(2, m + 2, m).unfold(3, m + 2, m)
    )
    seen = torch.einsum("pr,bihwrs,qs->pqbhwi", before, tiles, before).to(weight.numbers.dtype).float()
    products = torch.einsum("pqbhwi,pqio->pqbohw", seen, unpacked(weight).float())
    y = torch.einsum("rp,pqbohw,sq->bohrws", after, products, after).flatten(4).flatten(2, 3)[:, :, :height, :width]
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)


def unpacked(weight: Transformed) -> Float[Tensor, "n n i o"]:
    """Return G g G^T of each input and output."""
    (_, panel), dtype, size = widths(), weight.numbers.dtype, weight.m + 2
    inner, step = padded(weight.inner, dtype), 2 if dtype == torch.bfloat16 else 1
    wide = weight.numbers.numel() // (size**2 * inner)
    parts = weight.numbers.split(size**2 * inner * panel)
    counts = [min(panel, wide - first) for first in range(0, wide, panel)]
    panels = [part.view(size, size, inner // step, count, step) for part, count in zip(parts, counts, strict=True)]
    whole = torch.cat([part.transpose(3, 4).reshape(size, size, inner, -1) for part in panels], -1)
    return whole[:, :, : weight.inner, : weight.outer]
