r"""How much memory a picture takes beside the weights, before it is taken.

A U-Net holds what it leaves on the way down, and at one level at a time what a block needs; with B rows in a call, p_l
pixels and c_l channels at level l, n blocks a level, and k = 6 for residual blocks (the joined state, its norm, the
convolution's input and output, the shortcut) and 20 where there are transformers (eight c for the gated hidden units,
twice, beside what goes around them),

    M = size B (sum_l (n + 1) p_l c_l + max_l k_l p_l c_l).                                               (1)

An autoencoder has no skips: the largest of its levels counts, of a tile where it goes by tiles. The figures are checked
beside what a run takes, in docs/speed.md; of other networks only what samples take is known.
"""

import torch
from torch import nn

from reverie.models.codec import Codec
from reverie.models.plan import SamplingPlan
from reverie.networks.autoencoder import ConvolutionalAutoencoder
from reverie.networks.captioned import Captioned
from reverie.networks.packed import Packed
from reverie.networks.unet import UNet

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
    """Return the bytes of one call of the network: (1); 0 where it is no U-Net."""
    unet = network.image if isinstance(network, Captioned) else network
    if not isinstance(unet, UNet):
        return 0
    asked = plan.batch_size * (2 if plan.guided else 1)
    rows = asked if plan.bucket is None else plan.bucket
    config = unet.config
    height, width = (-(-side // config.patch) for side in plan.shape[1:])
    skips, most = 0, 0
    for level, channels in enumerate(config.channels):
        pixels = -(-height // 2**level) * -(-width // 2**level)
        attends = "Cross" in config.down_types[level]
        wide = max(channels, config.channels[max(level - 1, 0)])
        skips += (config.layers + 1) * pixels * channels
        most = max(most, pixels * (TRANSFORMER * channels if attends else RESIDUAL * wide))
    return rows * (skips + most) * itemsize(unet, plan.dtype)


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
