r"""Convolutions of 3x3, of stride 1 and padding 1, with fewer multiplications, for weights that no longer change.

    y = A^T ( sum_i (G g_i G^T) * (B^T d_i B) ) A                                                       (1)

for each tile of m x n pixels, made of the (m + 2) x (n + 2) that it sees of each input i: 2 x 2 take 16
multiplications where a plain convolution takes 36, 2 x 4 take 24 where it takes 72, and 4 x 4 take 36 where it takes
144. G g G^T is worked out once, in float64. The matrices, one for each side, are those of polynomials at m + 1 points
and infinity,

    A^T = [ p^k ],    G = [ p^k / prod_q (p - q) ],    B^T from prod_q (x - q) / (x - p),                    (2)

at 0, 1, -1 for m = 2, and at 0, 2/3, -2/3, 3/2, -3/2 for m = 4, which lose less than the usual 0, 1, -1, 2, -2.

An image of which each pixel is repeated 2 x 2 before it is convolved need not be made: along a side

    y_2j = s d_j + g_0 (d_{j-1} - d_j),    y_{2j+1} = s d_j + g_2 (d_{j+1} - d_j),    s = g_0 + g_1 + g_2,   (3)

take 3 multiplications for 2 pixels. That is (1) with a tile of one pixel, of which four come: 9 multiplications where
they take 36. Where the repeated image is cut to an odd size its last pixel is y_2j, which sees a zero in the place of
the second d_j: it has g_2 (0 - d_j) besides.

What it costs. The weights take (m + 2)(n + 2) / 9 times as much: 1.8 for 2 x 2, 2.7 for 2 x 4, 4 for 4 x 4, 1 for (3).
The transformed numbers are rounded to bfloat16 where that is the dtype: by 2 x 2 a result is off by 4.2e-3 where a
plain convolution is by 1.7e-3 (relative, of weights and images that are exact), by 2 x 4 by 6.7e-3, by 4 x 4 by 1.1e-2,
by (3) by 2.9e-3. In float32 the error is some 3e-7 (2 x 2), 1.5e-6 (4 x 4) and 1.6e-7 (3). A NaN or an infinity makes
NaN of the tiles that see it, not only of the pixels that do.

In bfloat16 4 x 4 is for the middle of a network. What the first and the last layers round shows in the result, and they
are those of few channels: with 4 x 4 throughout a step of Stable Diffusion is off by 1.83e-2, where 2 x 4 makes 1.34e-2
of it, and with 4 x 4 where `LEAST` says 1.43e-2.

Which tile serves a layer is decided by its numbers of inputs and outputs alone (`tile`), so that a sample's bits depend
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

from reverie.kernels.dispatch import SUFFIX, call, fast, has, integers, needs_gradient, pointer, widths

Tile = tuple[int, int]  # its height and width in pixels

DOUBLED: Tile = (1, 1)  # of an image whose pixels are repeated
POINTS = {2: (0, 1, -1), 4: (0, Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))}
FEWEST = 32  # inputs and outputs: with fewer, the transforms take what is saved
LEAST = 3 * 2**17  # inputs times outputs, with tiles of 4 x 4 in bfloat16
MOST = 3 * 2**19  # inputs times outputs, with tiles of 4 x 4: the weights take 36 numbers for each, 216 MiB


class Transformed(NamedTuple):
    """A weight as (1) multiplies by it.

    Arguments:
        numbers: G g G^T, in panels of outputs, as csrc/winograd.h reads them.
        tile: Its height and width.
        inner, outer: The numbers of inputs and outputs.
    """

    numbers: Float[Tensor, " n"]
    tile: Tile
    inner: int
    outer: int


@cache
def matrices(m: int) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n r"], Float[Tensor, "n n"]]:
    """Return A^T, G and B^T in float64: (2); for m = 1 those of (3).

    Example:
        >>> matrices(2)[2].tolist()[0]
        [1.0, 0.0, -1.0, 0.0]
    """
    if (m, m) == DOUBLED:
        tables = [[1, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 1], [0, 0, 1]], [[1, -1, 0], [0, 1, 0], [0, -1, 1]]
        made = [torch.tensor(table, dtype=torch.float64) for table in tables]
        return made[0], made[1], made[2]
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


def tile(inner: int, outer: int, dtype: torch.dtype, trained: bool = False, doubled: bool = False) -> Tile | None:
    """Return the tile that serves a convolution best here, or None where a plain one does.

    Arguments:
        inner, outer: The numbers of inputs and outputs.
        dtype: That of images and weights.
        trained: Whether the weight changes, and is transformed at each step.
        doubled: Whether the images' pixels are repeated.

    Example:
        >>> tile(3, 64, torch.float32)
    """
    if min(inner, outer) < FEWEST or dtype not in SUFFIX:
        return None
    large, found = inner * outer <= MOST, (2, 2)
    if doubled:
        found = DOUBLED
    elif dtype == torch.bfloat16 and not trained:
        found = (4, 4) if large and inner * outer >= LEAST else (2, 4)
    elif dtype == torch.float32 and large:
        found = (4, 4)
    return found if fast() and has(named(found, dtype)) else None


def named(tile: Tile, dtype: torch.dtype, part: str = "") -> str:
    """Return the name of the library's function for a tile and a dtype."""
    return f"reverie_winograd{tile[0]}{tile[1]}{part}{SUFFIX[dtype]}"


def transform(weight: Float[Tensor, "o i h w"], tile: Tile, dtype: torch.dtype) -> Transformed:
    """Return a weight of 3x3 as (1) multiplies by it, rounded once to a dtype.

    Arguments:
        weight: g (O, I, 3, 3).
        tile: Its height and width, as `tile` has them.
        dtype: That of the images.
    """
    outer, inner = weight.shape[:2]
    vector, _ = widths()
    wide = -(-outer // vector) * vector
    numbers = torch.empty((tile[0] + 2) * (tile[1] + 2) * padded(inner, dtype) * wide, dtype=dtype)
    plain = weight.detach().float().contiguous()
    sizes = ctypes.c_int64(outer), ctypes.c_int64(inner)
    call(named(tile, dtype, "_weights"), pointer(plain), *sizes, pointer(numbers))
    return Transformed(numbers, tile, inner, outer)


def padded(inner: int, dtype: torch.dtype) -> int:
    """Return the numbers in a row: in bfloat16 they go in pairs."""
    return inner + inner % 2 if dtype == torch.bfloat16 else inner


def convolve(
    x: Float[Tensor, "b i h w"],
    weight: Transformed,
    bias: Float[Tensor, " o"] | None,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "b o h2 w2"]:
    """Return the convolution of images: (1).

    Arguments:
        x: Images (B, I, H, W) of the weight's dtype, of any size and in any layout; those in channels-last are read as
            they are.
        weight: The weight.
        bias: One for each output, in float32.
        size: The height and width of the result with a tile that is `DOUBLED`: 2 H or 2 H - 1, and 2 W or 2 W - 1, to
            which the repeated pixels are cut first; the former where None.
    """
    size = fitting(x, weight.tile, size)
    if needs_gradient(x) or not fast(x) or x.dtype != weight.numbers.dtype:
        return plain(x, weight, bias, size)
    x = x.contiguous(memory_format=torch.channels_last)
    samples, inner, height, width = x.shape
    y = torch.empty(samples, weight.outer, *size, dtype=x.dtype, memory_format=torch.channels_last)
    if y.numel():
        shape = integers(samples, height, width, inner, weight.outer, *size)
        call(named(weight.tile, x.dtype), shape, *map(pointer, (x, weight.numbers, bias, y)))
    return y


def fitting(x: Float[Tensor, "b i h w"], tile: Tile, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the height and width of a result, as asked or the whole of it."""
    height, width = x.shape[2:]
    if tile != DOUBLED:
        assert size in (None, (height, width))
        return height, width
    high, wide = size or (2 * height, 2 * width)
    assert high in (2 * height, 2 * height - 1), (high, height)
    assert wide in (2 * width, 2 * width - 1), (wide, width)
    return high, wide


def plain(
    x: Float[Tensor, "b i h w"],
    weight: Transformed,
    bias: Float[Tensor, " o"] | None,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "b o h2 w2"]:
    """The twin: (1) by PyTorch, for what the library can't be given."""
    size = fitting(x, weight.tile, size)
    (m, n), (height, width) = weight.tile, x.shape[2:]
    high, wide = -(-height // m), -(-width // n)
    after, after2 = (afterwards(*side) for side in zip(weight.tile, (high, wide), size, strict=True))
    before, before2 = (matrices(side)[2].float() for side in weight.tile)
    padded_x = F.pad(x.float(), (1, wide * n + 1 - width, 1, high * m + 1 - height))
    tiles = padded_x.unfold(2, m + 2, m).unfold(3, n + 2, n)
    seen = torch.einsum("pr,bihwrs,qs->pqbhwi", before, tiles, before2).to(weight.numbers.dtype).float()
    products = torch.einsum("pqbhwi,pqio->pqbohw", seen, unpacked(weight).float())
    y = torch.einsum("hrp,pqbohw,wsq->bohrws", after, products, after2).flatten(4).flatten(2, 3)
    y = y[:, :, : size[0], : size[1]]
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)


def afterwards(m: int, tiles: int, size: int) -> Float[Tensor, "t r p"]:
    """Return A^T of each tile along a side of the result: of (3), the last has more to sum where it is cut."""
    after = matrices(m)[0].float().repeat(tiles, 1, 1)
    if (m, m) == DOUBLED and size % 2:
        after[-1, 0] = 1
    return after


def unpacked(weight: Transformed) -> Float[Tensor, "n k i o"]:
    """Return G g G^T of each input and output."""
    (_, panel), dtype, (rows, columns) = widths(), weight.numbers.dtype, (side + 2 for side in weight.tile)
    inner, step = padded(weight.inner, dtype), 2 if dtype == torch.bfloat16 else 1
    wide = weight.numbers.numel() // (rows * columns * inner)
    parts = weight.numbers.split(rows * columns * inner * panel)
    counts = [min(panel, wide - first) for first in range(0, wide, panel)]
    panels = [part.view(rows, columns, inner // step, count, step) for part, count in zip(parts, counts, strict=True)]
    whole = torch.cat([part.transpose(3, 4).reshape(rows, columns, inner, -1) for part in panels], -1)
    return whole[:, :, : weight.inner, : weight.outer]
