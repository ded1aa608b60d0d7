r"""How much memory a picture takes beside the weights, before it is taken.

A U-Net holds what it leaves on the way down, and at one level at a time what a block needs; with B rows in a call, p_l
pixels and c_l channels at level l, n blocks a level, and k = 6 for residual blocks (the joined state, its norm, the
convolution's input and output, the shortcut) and 20 where there are transformers (eight c for the gated hidden units,
twice, beside what goes around them),

    M = size B (sum_l (n + 1) p_l c_l + max_l k_l p_l c_l).                                               (1)

EDM2's network is the same with k = 6, which its queries, keys and values do not exceed. A transformer of p patches and
c channels, whose mlp is r times as wide, holds what a block needs: the state, its norm, and the hidden units twice,

    M = size B p c (3 + 2 r).                                                                             (2)

An autoencoder has no skips: the largest of its levels counts, of a tile where it goes by tiles. The figures are checked
beside what a run takes, in docs/speed.md; of other networks only what samples take is known.
"""

from collections.abc import Sequence

import torch
from torch import nn

from reverie.models.codec import Codec
from reverie.models.plan import SamplingPlan
from reverie.networks.autoencoder import ConvolutionalAutoencoder
from reverie.networks.captioned import Captioned
from reverie.networks.dit import DiT, DiTConfig
from reverie.networks.edm2 import EDM2
from reverie.networks.packed import Packed
from reverie.networks.unet import UNet
from reverie.networks.unet_config import UNetConfig

RESIDUAL, TRANSFORMER, DECODER = 6, 20, 5  # tensors of a level that are there at once


def working_bytes(network: nn.Module, codec: Codec | None, plan: SamplingPlan) -> int:
    """Return the bytes that drawing takes beside weights and samples: the larger of a step's and of decoding.

    Arguments:
        network: The denoiser's.
        codec: What decodes; None where pictures are denoised.
        plan: What is asked for.
    """
    return max(step_bytes(network, plan), 0 if codec is None else codec_bytes(codec, plan.shape))


def step_bytes(network: nn.Module, plan: SamplingPlan) -> int:
    """Return the bytes of one call of the network: (1) or (2); 0 where it is none of these."""
    image = network.image if isinstance(network, Captioned) else network
    asked = plan.batch_size * (2 if plan.guided else 1)
    rows = asked if plan.bucket is None else plan.bucket
    return rows * numbers_of(image, *plan.shape[1:]) * itemsize(image, plan.dtype)


def numbers_of(network: nn.Module, *size: int) -> int:
    """Return how many numbers a network holds at once for one image of some height and width."""
    if not isinstance(network, DiT | UNet | EDM2):
        return 0
    config = network.config
    height, width = (-(-side // getattr(config, "patch", 1)) for side in size)
    if isinstance(config, DiTConfig):
        return round(height * width * config.width * (3 + 2 * config.mlp_ratio))
    attends = [isinstance(config, UNetConfig) and "Cross" in config.down_types[i] for i in range(len(config.channels))]
    return pyramid(config.channels, config.layers, attends, (height, width))


def pyramid(channels: Sequence[int], layers: int, attends: Sequence[bool], size: Sequence[int]) -> int:
    """Return the numbers of (1), for one image of height and width `size`, without the bytes of each."""
    skips, most = 0, 0
    for level, inner in enumerate(channels):
        pixels = -(-size[0] // 2**level) * -(-size[1] // 2**level)
        wide = max(inner, channels[max(level - 1, 0)])
        skips += (layers + 1) * pixels * inner
        most = max(most, pixels * (TRANSFORMER * inner if attends[level] else RESIDUAL * wide))
    return skips + most


def codec_bytes(codec: Codec, shape: tuple[int, ...]) -> int:
    """Return the bytes of decoding latents (c, h, w), one at a time."""
    network = codec.network
    height, width = shape[1:]
    picture = 4 * codec.channels * height * width * codec.factor**2
    if not isinstance(network, ConvolutionalAutoencoder):
        return 2 * picture
    limit, tile, _ = codec.limits(codec.tile, 1)
    if max(height, width) > limit:
        height, width, picture = min(height, tile), min(width, tile), 3 * picture
    most = 0
    widths = network.config.channels
    for level, channels in enumerate(widths):
        # What comes up from the level below has its channels, at this level's size.
        wide = widths[min(level + 1, len(widths) - 1)] if level < len(widths) - 1 else channels
        most = max(most, height * width * (codec.factor >> level) ** 2 * wide)
    return DECODER * most * itemsize(network, codec.dtype) + picture


def itemsize(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Return the bytes of a number that a network computes with."""
    packed = next((m.dtype for m in network.modules() if isinstance(m, Packed) and m.dtype != torch.float32), None)
    return (packed or dtype or torch.float32).itemsize


def weights_bytes(*networks: nn.Module | None) -> int:
    """Return the bytes that the weights of networks take, each tensor counted once.

    Example:
        >>> weights_bytes(nn.Linear(3, 2), None)
        32
    """
    total = 0
    for network in networks:
        if network is None:
            continue
        total += sum(t.numel() * t.element_size() for t in {id(p): p for p in network.parameters()}.values())
        total += sum(module.bytes for module in network.modules() if isinstance(module, Packed))
    return total
