"""Derivatives along a direction, in forward mode: a network's value and its slope in one pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def along(
    function: Callable[..., Tensor], values: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a function's value, with its gradient to come, and its slope along the directions, without.

    Arguments:
        function: Takes as many tensors as there are values.
        values: Where.
        directions: How each moves, of its shape and dtype.

    Example:
        >>> along(torch.sin, [torch.zeros(2)], [torch.tensor([1.0, 3.0])])[1]
        tensor([1., 3.])
    """
    # Attention's fast kernels have no forward mode.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        inputs = [forward_ad.make_dual(value, way) for value, way in zip(values, directions, strict=True)]
        result = forward_ad.unpack_dual(function(*inputs))
        slope = torch.zeros_like(result.primal) if result.tangent is None else result.tangent
        return result.primal, slope.detach()
