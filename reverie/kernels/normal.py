r"""Standard normal numbers of many keys: the bits of NumPy's generator, in a fifth of its time.

Philox's words come in blocks; a word is a number at once where it lies within its layer of the ziggurat, 99 of 100, so
that these are made for a whole chunk of words side by side, and the rest one by one as their turn comes. As the bits
are the same, it takes NumPy's place in `reverie.base.randomness` when this is imported.

References:
    Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., 2011)
    https://doi.org/10.1145/2063384.2063405
    The Ziggurat Method for Generating Random Variables (Marsaglia & Tsang, 2000)
    https://doi.org/10.18637/jss.v005.i08
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.randomness import Filling, plain_fill
from reverie.kernels.dispatch import fast, library


def fill(rows: Float[Tensor, "b n"], keys: Sequence[bytes]) -> None:
    """Write standard normal numbers into rows (B, n), each fixed by its key's digest of 16 bytes.

    Arguments:
        rows: What to fill, float32 in the CPU's memory, without gaps.
        keys: The digests (B,).

    Example:
        >>> rows, twin = torch.empty(1, 5), torch.empty(1, 5)
        >>> fill(rows, [bytes(16)]), plain_fill(twin, [bytes(16)]), torch.equal(rows, twin)
        (None, None, True)
    """
    if fast(rows, dtypes=(torch.float32,)):
        function(library())(b"".join(keys), *rows.shape, rows.data_ptr(), torch.get_num_threads())
    else:
        plain_fill(rows, keys)


@cache
def function(found: Any) -> Any:
    """Return a library's function."""
    found.reverie_normals.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    return found.reverie_normals


Filling.fill = staticmethod(fill)
