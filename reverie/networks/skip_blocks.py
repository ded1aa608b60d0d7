r"""The blocks of NCSN++: the image itself goes down beside the state, and the output comes up beside it.

Down, the image is halved and its 1x1 convolution added to the state; up, each level adds a convolution of
its state to the output so far, doubled. Sums are divided by sqrt(2), and images are resampled by the
filter (1, 3, 3, 1) / 8 in each direction,

    halve(x)[i] = sum_j k_j x[2 i + j - 1],    double(x)[2 i + j - 1] += 2 k_j x[i].                       (1)

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.4
    https://arxiv.org/abs/2011.13456
    Analyzing and Improving the Image Quality of StyleGAN (Karras et al., 2020), section 4.1
    https://arxiv.org/abs/1912.04958
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.networks.layers import AnyImage, GroupNorm, Image, Resized, crop
from reverie.networks.unet_blocks import Block, Context, Embedding, residual, self_attention, up_widths
from reverie.networks.unet_config import UNetConfig

ROOT2 = math.sqrt(2)
ATTENTION_GROUPS = 32


def _kernel(x: Image) -> Tensor:
    """Return the filter for each channel of x (C, 1, 4, 4), summing to one."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    return torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)


def fir_halve(x: Image) -> Resized:
    """Halve an image with the filter; an odd size is rounded up."""
    x = F.pad(x, (1, 1 + x.shape[3] % 2, 1, 1 + x.shape[2] % 2))
    return F.conv2d(x, _kernel(x), stride=2, groups=x.shape[1])


def fir_double(x: Image) -> Resized:
    """Double an image with the filter."""
    return F.conv_transpose2d(x, 4 * _kernel(x), stride=2, padding=1, groups=x.shape[1])


def groups_of(channels: int) -> int:
    """Return the groups of a norm: four channels each, and 32 at most."""
    return min(channels // 4, 32)


class SkipDownBlock(Block):
    """One level on the way down: SkipDownBlock2D, AttnSkipDownBlock2D."""

    def __init__(self, config: UNetConfig, kind: str, level: int) -> None:
        super().__init__()
        channels = config.channels[level]
        widths = [config.channels[max(level - 1, 0)]] + [channels] * (config.layers - 1)
        out: dict[str, Any] = {"groups_out": groups_of(channels), "scale_out": ROOT2}
        self.resnets = nn.ModuleList([residual(config, i, channels, groups=groups_of(i), **out) for i in widths])
        if "Attn" in kind:
            self.attentions = nn.ModuleList(
                [self_attention(config, channels, ATTENTION_GROUPS, ROOT2) for _ in self.resnets]
            )
        self.resnet_down = self.skip_conv = None
        if level < len(config.channels) - 1:
            out |= {"groups": groups_of(channels), "resample": fir_halve, "shortcut": True}
            self.resnet_down = residual(config, channels, channels, **out)
            self.skip_conv = nn.Conv2d(config.in_channels, channels, 1)

    def forward(
        self, x: Image, emb: Embedding, context: Context | None, skips: list[Tensor], image: AnyImage
    ) -> tuple[AnyImage, AnyImage]:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, context)
            skips.append(x)
        if self.resnet_down is not None and self.skip_conv is not None:
            image = fir_halve(image)
            x = self.resnet_down(x, emb) + self.skip_conv(image)
            skips.append(x)
        return x, image


class SkipUpBlock(Block):
    """One level on the way up: SkipUpBlock2D, AttnSkipUpBlock2D, which attends once, after its residual blocks."""

    def __init__(self, config: UNetConfig, kind: str, level: int) -> None:
        super().__init__()
        channels = config.channels[level]
        out: dict[str, Any] = {"groups_out": groups_of(channels), "scale_out": ROOT2}
        self.resnets = nn.ModuleList()
        for state, skip in up_widths(config, level):
            # With attention, diffusers divides only the skip's channels by four, and checkpoints have it so.
            groups = min(state + skip // 4, 32) if "Attn" in kind else groups_of(state + skip)
            self.resnets.append(residual(config, state + skip, channels, groups=groups, **out))
        if "Attn" in kind:
            self.attentions = nn.ModuleList([self_attention(config, channels, ATTENTION_GROUPS, ROOT2)])
        self.resnet_up = self.skip_norm = self.skip_conv = None
        if level > 0:
            out |= {"groups": groups_of(channels), "resample": fir_double, "shortcut": True}
            self.resnet_up = residual(config, channels, channels, **out)
            self.skip_norm = GroupNorm(groups_of(channels), channels, config.norm_eps)
            self.skip_conv = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def _layer(self, index: int, x: Image, emb: Embedding, context: Context | None) -> AnyImage:
        x = self.resnets[index](x, emb)
        if self.attentions is None or index < len(self.resnets) - 1:
            return x
        return self.attentions[0](x)

    def forward(
        self, x: Image, emb: Embedding, context: Context | None, skips: list[Tensor], image: AnyImage | None
    ) -> tuple[AnyImage, AnyImage | None]:
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, skips.pop()], 1), emb, context)
        if image is not None:
            image = crop(fir_double(image), x)
        if self.resnet_up is not None and self.skip_norm is not None and self.skip_conv is not None:
            update = self.skip_conv(self.skip_norm(x, "silu"))
            image = update if image is None else image + update
            x = self.resnet_up(x, emb, skips[-1])
        return x, image
