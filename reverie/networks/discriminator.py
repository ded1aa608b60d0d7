r"""A critic of patches: for each patch of an image a number, large where it looks real.

    max(0, 1 - D(x)) + max(0, 1 + D(x'))  over 2, for the critic;    -D(x')  for what makes x'               (1)

References:
    Image-to-Image Translation with Conditional Adversarial Networks (Isola et al., 2017), section 3.2.2
    https://arxiv.org/abs/1611.07004
    Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021), section 3.1 and eq. 7
    https://arxiv.org/abs/2012.09841
"""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reverie.networks.layers import AnyImage, GroupNorm

Score = Float[Tensor, "b 1 h w"]


class Discriminator(nn.Module):
    """Convolutions with stride 2, each with twice the channels of the one before, and a score for each patch.

    Arguments:
        channels: Channels of the images.
        width: Channels after the first convolution.
        layers: Convolutions with stride 2.

    Example:
        >>> import torch
        >>> Discriminator(3, width=8, layers=2)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels: int, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(layers)]
        self.first = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(GroupNorm(max(1, b // 16), b) for b in widths[1:])
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: AnyImage) -> Score:
        """Return a score for each patch (B, 1, h, w) of images (B, C, H, W) of at least 2^layers pixels a side."""
        x = F.leaky_relu(self.first(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.last(x)


def hinge(real: Score, made: Score) -> Float[Tensor, ""]:
    """Return the critic's loss: equation (1).

    Example:
        >>> import torch
        >>> float(hinge(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2)))
        0.0
    """
    return (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean()) / 2
