r"""Linear layers with weights that no longer change, in panels of outputs, and gated units in the same walk.

    y = x W^T + b                                                                                        (1)
    y = h gelu(g),    [h, g] = x W^T + b                                                                 (2)
    y = z + x W^T + b                                                                                    (3)

A panel holds as many outputs as a tile of registers has columns, each input's side by side, so that a product reads it
from end to end. For (2) half of a panel's outputs are of h and half their fellows of g: both are there when a tile is
done, and the widest tensor of a transformer is never written. Sums are in float32, and y is rounded once; by oneDNN's
product and `reverie.kernels.gate`, or a sum, after it, twice.

The twin is PyTorch's product of the same numbers. Which layers it serves is decided by the processor and a layer's
number of inputs: one with AMX multiplies bfloat16 by tiles that oneDNN has and this has not.

References:
    Anatomy of High-Performance Matrix Multiplication (Goto & van de Geijn, 2008)
    https://doi.org/10.1145/1356052.1356053
    GLU Variants Improve Transformer (Shazeer, 2020), equation 6
    https://arxiv.org/abs/2002.05202
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import gate
from reverie.kernels.dispatch import SUFFIX, call, fast, has, integers, needs_gradient, pointer, widths


class Panels(NamedTuple):
    """A layer as (1) or (2) multiplies by it.

    Arguments:
        numbers: W in panels of outputs, as csrc/linear.h reads them.
        bias: b in the order of the panels' columns, in float32; zeros where there is none.
        inner, outer: The numbers of inputs, and of outputs of y.
        gated: Whether y is (2), and W has 2 outer rows.
    """

    numbers: Float[Tensor, " n"]
    bias: Float[Tensor, " c"]
    inner: int
    outer: int
    gated: bool


def serves(inner: int, dtype: torch.dtype) -> bool:
    """Whether panels are used here for layers of so many inputs.

    Example:
        >>> serves(64, torch.float64)
        False
    """
    if dtype not in SUFFIX or inner % words(dtype) or not fast():
        return False
    tiles = dtype == torch.bfloat16 and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return has(f"reverie_linear{SUFFIX[dtype]}") and not tiles


def words(dtype: torch.dtype) -> int:
    """Return how many numbers the library multiplies at once."""
    return 2 if dtype == torch.bfloat16 else 1


def panels(
    weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, dtype: torch.dtype, gated: bool = False
) -> Panels:
    """Lay a layer out for (1) or (2), rounded to a dtype.

    Arguments:
        weight: W (O, I), for (2) with the rows of h before those of g; `serves` has I and the dtype.
        bias: b (O,).
        dtype: That of x.
        gated: Whether y is (2).
    """
    outer, inner = weight.shape
    rows = in_columns(torch.zeros(outer) if bias is None else bias.detach().float(), gated)
    numbers, plain = torch.empty(len(rows) * inner, dtype=dtype), weight.detach().float().contiguous()
    kept = outer // 2 if gated else outer
    shape = integers(kept, inner)
    call(f"reverie_linear_weights{SUFFIX[dtype]}", shape, pointer(plain), pointer(numbers), int(gated))
    return Panels(numbers, rows, inner, kept, gated)


def in_columns(rows: Float[Tensor, " o"], gated: bool) -> Float[Tensor, " c"]:
    """Return a number for each column of the panels, those beyond the outputs zero."""
    vector, width = widths()
    parts = [F.pad(part, (0, -len(part) % vector)) for part in (rows.chunk(2) if gated else (rows,))]
    if not gated:
        return parts[0]
    turns = zip(*(part.split(width // 2) for part in parts), strict=True)
    return torch.cat([half for pair in turns for half in pair])


def product(
    x: Float[Tensor, "... i"], layer: Panels, onto: Float[Tensor, "... o"] | None = None
) -> Float[Tensor, "... o"]:
    """Return (1) or (2); or (3).

    Arguments:
        x: Rows (..., I), of the layer's dtype.
        layer: The layer; with z, one that is not gated.
        onto: z, of what is returned.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.ones(3, 2)
        >>> product(x, panels(weight, None, torch.float32)).tolist() if serves(2, torch.float32) else [[2.0] * 3]
        [[2.0, 2.0, 2.0]]
    """
    dtype = layer.numbers.dtype
    assert onto is None or not layer.gated
    if needs_gradient(x, onto) or not fast(x, onto) or x.dtype != dtype:
        return plain(x, layer, onto)
    return walk("linear", (x.numel() // layer.inner, layer.inner // words(dtype)), x, layer, onto)


def walk(
    name: str,
    sizes: tuple[int, ...],
    x: Float[Tensor, "... i"],
    layer: Panels,
    onto: Float[Tensor, "... o"] | None,
) -> Float[Tensor, "... o"]:
    """Call one of the library's products of rows and a layer.

    Arguments:
        name: What it is called, without its dtype.
        sizes: What it is told of the rows.
        x: Rows, of the layer's dtype.
        layer: The layer, laid out for it.
        onto: What it adds to.
    """
    dtype = layer.numbers.dtype
    x, y = x.contiguous(), torch.empty(*x.shape[:-1], layer.outer, dtype=dtype)
    onto = None if onto is None else onto.to(dtype).expand_as(y).contiguous()
    if y.numel():
        arrays = map(pointer, (x, layer.numbers, layer.bias, onto, y))
        call(f"reverie_{name}{SUFFIX[dtype]}", integers(*sizes, layer.outer), *arrays, int(layer.gated))
    return y


def plain(
    x: Float[Tensor, "... i"], layer: Panels, onto: Float[Tensor, "... o"] | None = None
) -> Float[Tensor, "... o"]:
    """The twin: (1), (2) or (3) by PyTorch, for what the library can't be given."""
    weight, bias = unpacked(layer)
    y = F.linear(x.float(), weight.float(), bias)
    y = y if onto is None else y + onto
    return (gate.plain(y) if layer.gated else y).to(x.dtype)


def unpacked(layer: Panels) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Return W and b as they were given."""
    (_, width), dtype = widths(), layer.numbers.dtype
    inner = layer.inner // words(dtype)
    parts = layer.numbers.view(torch.int32).split(width * inner)
    columns = torch.cat([part.view(inner, -1).T for part in parts]).view(dtype), layer.bias
    if not layer.gated:
        return columns[0][: layer.outer], columns[1][: layer.outer]
    halves = [zip(*(part.chunk(2) for part in one.split(width)), strict=True) for one in columns]
    weight, bias = (torch.cat([torch.cat(side)[: layer.outer] for side in sides]) for sides in halves)
    return weight, bias
