r"""A distance between images that looks at patterns rather than at pixels, by a network that was never trained.

    d(x, y) = sum_l mean_hw | f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)| |^2                                      (1)

f_l (B, C_l, h, w) are the activations of a few convolutions whose weights are random, and the same every time: the
form of LPIPS, without weights that would have to be fetched. What it is sensitive to comes from the structure of such
networks, edges and textures at several scales, more than from what they were trained on.

References:
    The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018), eq. 1
    https://arxiv.org/abs/1801.03924
    Generic Perceptual Loss for Modeling Structured Output Dependencies (Liu et al., 2021)
    https://arxiv.org/abs/2103.10571
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WIDTHS = (32, 64, 128)
SEED = 2103_10571


class Perceptual(nn.Module):
    """The distance (1); never trained, and no part of any checkpoint.

    Arguments:
        channels: Channels of the images.

    Example:
        >>> x = torch.rand(2, 3, 16, 16)
        >>> Perceptual(3)(x, x)
        tensor([0., 0.])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            self.stages = nn.ModuleList([stage(i, o) for i, o in pairwise((channels, *WIDTHS))])
        self.requires_grad_(False).eval()

    def forward(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Return the distance of each image to its counterpart (B,); both (B, C, H, W), in [-1, 1]."""
        both, total = torch.cat([x, y]), torch.zeros(len(x), device=x.device)
        for i, part in enumerate(self.stages):
            if i and min(both.shape[2:]) > 1:
                both = F.avg_pool2d(both, 2, ceil_mode=True)
            both = part(both)
            a, b = F.normalize(both.float(), dim=1).chunk(2)
            total = total + (a - b).square().sum(1).flatten(1).mean(1)
        return total


def stage(inputs: int, outputs: int) -> nn.Module:
    """Return two convolutions of random, orthogonal weights."""
    part = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(),
    )
    for layer in (part[0], part[2]):
        nn.init.orthogonal_(layer.weight, gain=2**0.5)  # type: ignore[arg-type]
    return part
