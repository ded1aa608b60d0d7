r"""Layer norm: each token less its mean and over its deviation.

    y = (x - mean) / sqrt(var + eps) w + b                                                              (1)

PyTorch's, and on a GPU, where no gradient is asked for, Triton's (`reverie.kernels.gpu`), which takes weights of
another dtype than x's.

References:
    Layer Normalization (Ba et al., 2016), equation 4
    https://arxiv.org/abs/1607.06450
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import gpu


def layer_norm(
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... c"]:
    """Normalise rows: equation (1).

    Arguments:
        x: Rows (..., C).
        weight, bias: One for each of the C; None for 1 and 0.
        eps: What is added to a variance.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0).tolist()
        [[-1.0, 1.0]]
    """
    if x.numel() and gpu.serves(x, weight, bias):
        return gpu.layer_norm(x, weight, bias, eps)
    if x.is_cuda and weight is not None and not torch.is_autocast_enabled("cuda"):
        weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))  # no mixture there
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
