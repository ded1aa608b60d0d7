r"""Sums of tensors, many at once, in one walk over memory.

    y_i = sum_j w_ij x_j                                                                                (1)

A step of a linear sampler is (1). The library's is for float32; it says whether every number of y came out finite,
as it has them in its hands.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reverie.kernels.dispatch import library

MOST = 8  # terms of a sum in the library
ADDRESS, empty_like = Tensor.data_ptr, torch.empty_like


class Blend:
    """The sums (1) of some weights.

    Arguments:
        rows: The weights w (sums, terms), finite.

    Example:
        >>> half = Blend([[0.5, 0.5]])
        >>> half.plain([torch.zeros(2), torch.ones(2)])[0].tolist()
        [0.5, 0.5]
    """

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self.rows = [list(row) for row in rows]
        self.terms, self.sums = len(self.rows[0]), len(self.rows)
        # What csrc/kernels.cpp calls a plan.
        weights = [weight for row in self.rows for weight in row]
        self._plan = struct.pack(f"2i{len(weights)}f", self.terms, self.sums, *weights)
        self._call = struct.Struct(f"{2 + self.terms + self.sums}q").pack

    def fast(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """Return the sums by the library, and whether all their numbers are finite.

        Arguments:
            tensors: x_j, float32 in the CPU's memory, all of one shape and one layout without gaps (`alike`).
        """
        if self.terms > MOST:
            return self.plain(tensors), False
        x = tensors[0]
        out = [empty_like(x)] if self.sums == 1 else [empty_like(x) for _ in range(self.sums)]
        call = self._call(x.numel(), torch.get_num_threads(), *map(ADDRESS, (*tensors, *out)))
        return out, not function()(self._plan, call)

    def plain(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums: the twin, by PyTorch, for tensors of any dtype and device."""
        return [total(row, tensors) for row in self.rows]


def total(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return one sum."""
    y = tensors[0] * weights[0]
    for weight, x in zip(weights[1:], tensors[1:], strict=True):
        y = y.add_(x, alpha=weight)
    return y


def alike(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor of x's shape in x's dtype and layout: itself, where it has them."""
    if type(tensor) is Tensor and tensor.dtype is x.dtype and tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


@cache
def function() -> Any:
    """Return the library's function."""
    found = library().reverie_blend  # type: ignore[union-attr]
    found.argtypes = [ctypes.c_char_p] * 2
    return found
