r"""Linear layers with seven products of halves where eight are plain, for weights that no longer change.

    y = x W^T + b,    y = h gelu(g) of [h, g] = x W^T + b,    y = z + x W^T + b                          (1)

as in `reverie.kernels.panels`. Two rows of x and W^T are cut into halves: A_11, A_12 of the one row, A_21, A_22 of the
other, and B_11 .. B_22, of inputs and outputs (with gated units, of h and g). With

    S_1 = A_21 + A_22,    S_2 = S_1 - A_11,    S_3 = A_11 - A_21,    S_4 = A_12 - S_2,                   (2)
    T_1 = B_12 - B_11,    T_2 = B_22 - T_1,    T_3 = B_22 - B_12,    T_4 = B_21 - T_2,

    P_1 = A_11 B_11,    P_2 = A_12 B_21,    P_3 = S_2 T_2,    P_4 = S_3 T_3,                             (3)
    P_5 = A_22 T_4,     P_6 = S_1 T_1,      P_7 = S_4 B_22

the two rows of the product are

    P_1 + P_2,  P_1 + P_3 + P_6 + P_7    and    P_1 + P_3 + P_4 + P_5,  P_1 + P_3 + P_4 + P_6.           (4)

T is worked out once, in float32, and rounded to the layer's dtype; S is rounded in each walk.

What it costs. The weight takes 7/4 times as much. In bfloat16 a result is off by 3.8e-3 where a plain product is by
1.7e-3 (relative, of weights and rows that are exact); in float32 by some 5e-7. What makes queries and keys bears that
least: a step of Stable Diffusion in bfloat16 is off by 1.36e-2, with the feed-forward layers done so by 1.39e-2, with
all by 1.6e-2 or more: `serves` has the former. A NaN or an infinity makes what is not finite of the two rows that go
together.

Row t of a sample goes with row t + T / 2 of the same, so that a sample's bits depend neither on the batch nor on the
threads.

The twin is (2) to (4) by PyTorch.

References:
    On multiplication of 2 x 2 matrices (Winograd, 1971)
    https://doi.org/10.1016/0024-3795(71)90009-7
    Gaussian elimination is not optimal (Strassen, 1969)
    https://doi.org/10.1007/BF02165411
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import gate
from reverie.kernels.dispatch import SUFFIX, call, fast, has, integers, needs_gradient, pointer, widths
from reverie.kernels.panels import Panels, walk, words
from reverie.kernels.panels import serves as panels_serve

LEAST = 512  # inputs, half as many with gated units: with fewer, adding the products up takes what is saved


class Halves(Panels):
    """A layer as (3) multiplies by it.

    Its `numbers` are B_11, B_21, T_2, T_3, T_4, T_1, B_22, in panels of a half's columns, as csrc/strassen.h has them;
    its `bias` is that of the one half's columns and then of the other's.
    """


def serves(inner: int, outer: int, dtype: torch.dtype, gated: bool = False) -> bool:
    """Whether a layer of so many inputs and outputs goes by (3) here.

    Arguments:
        inner: Its inputs.
        outer: Its outputs, with gated units those of h and g.
        dtype: What it computes in.
        gated: Whether y is of gated units: of the others it is those of four times as many inputs as outputs, as the
            layer after gated units has them.

    Example:
        >>> serves(64, 64, torch.float64)
        False
    """
    if not panels_serve(inner, dtype) or inner % (2 * words(dtype)) or not (gated or inner >= 4 * outer):
        return False
    return inner >= (LEAST // 2 if gated else LEAST) and has(f"reverie_strassen{SUFFIX[dtype]}")


def halves(
    weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, dtype: torch.dtype, gated: bool = False
) -> Halves:
    """Lay a layer out for (3).

    Arguments:
        weight: W (O, I), of gated units with the rows of h before those of g; `serves` has I and the dtype.
        bias: b (O,).
        dtype: That of x.
        gated: Whether y is of gated units.
    """
    outer, inner = weight.shape
    kept, columns = outer // 2 if gated else outer, wide(outer)
    rows = torch.zeros(outer) if bias is None else bias.detach().float()
    parts = rows.chunk(2) if gated else (rows[:columns], rows[columns:])
    both = torch.cat([F.pad(part, (0, columns - len(part))) for part in parts])
    numbers = torch.empty(7 * columns * inner // 2, dtype=dtype)
    plain = weight.detach().float().contiguous()
    call(
        f"reverie_strassen_weights{SUFFIX[dtype]}", integers(kept, inner), pointer(plain), pointer(numbers), int(gated)
    )
    return Halves(numbers, both, inner, kept, gated)


def wide(outer: int) -> int:
    """Return the columns of a half of so many, in whole vectors."""
    vector, _ = widths()
    return -(-((outer + 1) // 2) // vector) * vector


def product(
    x: Float[Tensor, "... i"], layer: Halves, onto: Float[Tensor, "... o"] | None = None
) -> Float[Tensor, "... o"]:
    """Return (1).

    Arguments:
        x: Samples of rows (..., T, I), of the layer's dtype; or rows (B, I), each a sample of its own.
        layer: The layer; with z, one that is not gated.
        onto: z, of what is returned.
    """
    dtype = layer.numbers.dtype
    assert onto is None or not layer.gated
    if needs_gradient(x, onto) or not fast(x, onto) or x.dtype != dtype:
        return plain(x, layer, onto)
    tokens = x.shape[-2] if x.ndim > 2 else 1
    samples = x.numel() // layer.inner // max(tokens, 1)
    return walk("strassen", (samples, tokens, layer.inner // words(dtype) // 2), x, layer, onto)


def plain(
    x: Float[Tensor, "... i"], layer: Halves, onto: Float[Tensor, "... o"] | None = None
) -> Float[Tensor, "... o"]:
    """The twin: (2) to (4) by PyTorch, for what the library can't be given."""
    dtype, shape = layer.numbers.dtype, (*x.shape[:-1], layer.outer)
    rows = x.float() if x.ndim > 2 else x.float().unsqueeze(-2)
    tokens = rows.shape[-2]
    (a11, a12), (a21, a22) = (part.chunk(2, -1) for part in F.pad(rows, (0, 0, 0, tokens % 2)).chunk(2, -2))
    s1 = a21 + a22
    s2 = s1 - a11
    sums = a11, a12, s2, a11 - a21, a22, s1, a12 - s2
    m = [a.to(dtype).float() @ b.float() for a, b in zip(sums, unpacked(layer), strict=True)]
    u2 = m[0] + m[2]
    u3 = u2 + m[3]
    bias, bias2 = layer.bias.chunk(2)
    left = torch.cat([m[0] + m[1], u3 + m[4]], -2) + bias
    right = torch.cat([u2 + m[5] + m[6], u3 + m[5]], -2) + bias2
    parts = [part[..., : layer.outer] for part in (left, right)] if layer.gated else [left, right]
    y = torch.cat(parts, -1)[..., :tokens, :]
    y = (gate.plain(y) if layer.gated else y[..., : layer.outer]).reshape(shape)
    return (y if onto is None else y + onto).to(x.dtype)


def unpacked(layer: Halves) -> list[Float[Tensor, "k c"]]:
    """Return B_11, B_21, T_2, T_3, T_4, T_1, B_22."""
    (_, width), dtype = widths(), layer.numbers.dtype
    inner, step, columns = layer.inner // 2, words(layer.numbers.dtype), len(layer.bias) // 2
    found = []
    for first, panel in zip(range(0, columns, width), layer.numbers.split(7 * inner * width), strict=True):
        count = min(width, columns - first)
        found.append(panel.view(7, inner // step, count, step).transpose(2, 3).reshape(7, inner, count))
    return list(torch.cat(found, -1).to(dtype))
