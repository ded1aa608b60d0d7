"""The blocks of a U-Net: one level on the way down, the middle, one level on the way up.

Every block has the names of its diffusers counterpart (resnets, attentions, downsamplers, upsamplers) and
the same call,

    x, image = block(x, emb, context, skips, image),

where x is the state, emb the embedding of time and label with its activation applied, context what the
transformers attend to, and skips the stack of states from which the way up takes what the way down left.
The image is for the blocks of NCSN++ (`skip_blocks.py`), which carry the input itself down and the output
up, level by level; the others pass it on.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reverie.networks.attention import SpatialAttention, SpatialTransformer
from reverie.networks.layers import Downsample, Image, ResidualBlock, Upsample, double, halve, repeated
from reverie.networks.unet_config import UNetConfig

# One for each sample; while the samples stand for two halves of a batch (`UNet.shares`), for those of both.
Embedding = Float[Tensor, "k t"]
Context = Float[Tensor, "k l d"]
Result = Float[Tensor, "_ _ _ _"]


def residual(config: UNetConfig, in_channels: int, out_channels: int, **settings: Any) -> ResidualBlock:
    """Build a residual block with the config's settings, and others where they are given."""
    settings = {
        "groups": config.norm_num_groups,
        "eps": config.norm_eps,
        "act": config.act_fn,
        "dropout": config.dropout,
        "scale_shift": config.resnet_time_scale_shift == "scale_shift",
        **settings,
    }
    return ResidualBlock(in_channels, out_channels, config.time_channels, **settings)


def self_attention(config: UNetConfig, channels: int, groups: int | None, scale_out: float = 1.0) -> SpatialAttention:
    """Build the attention of a level with so many channels."""
    return SpatialAttention(channels, *config.heads(channels), groups, config.norm_eps, scale_out)


def attention(config: UNetConfig, kind: str, level: int) -> SpatialAttention | SpatialTransformer:
    """Build the attention of a block of that type, at a level counted from the top."""
    channels = config.channels[level]
    if "Cross" not in kind:
        return self_attention(config, channels, config.norm_num_groups)
    return transformer(config, level)


def transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    """Build the transformer of a level."""
    channels = config.channels[level]
    assert config.context_dim is not None
    return SpatialTransformer(
        channels,
        *config.heads(channels),
        config.context_dim,
        config.depth(level),
        config.groups(channels),
        config.use_linear_projection,
    )


class Block(nn.Module):
    """Residual blocks, each followed by its attention where there is one.

    Attributes:
        checkpointing: Keep only the state between layers, and compute the rest again for the gradients.
    """

    resnets: nn.ModuleList
    attentions: nn.ModuleList | None

    def __init__(self) -> None:
        super().__init__()
        self.attentions = None
        self.checkpointing = False

    def layer(self, index: int, x: Image, emb: Embedding, context: Context | None) -> Result:
        """Apply one residual block and its attention."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layer, index, x, emb, context, use_reentrant=False)
        return self._layer(index, x, emb, context)

    def _layer(self, index: int, x: Image, emb: Embedding, context: Context | None) -> Result:
        x = self.resnets[index](x, emb[: len(x)])
        return x if self.attentions is None else self.attentions[index](x, context)


class DownBlock(Block):
    """One level on the way down: DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D, CrossAttnDownBlock2D.

    Arguments:
        config: The network's.
        kind: One of those names.
        level: The level, counted from the top.
    """

    def __init__(self, config: UNetConfig, kind: str, level: int) -> None:
        super().__init__()
        channels = config.channels[level]
        widths = [config.channels[max(level - 1, 0)]] + [channels] * (config.layers - 1)
        self.resnets = nn.ModuleList([residual(config, i, channels) for i in widths])
        if "Attn" in kind:
            self.attentions = nn.ModuleList([attention(config, kind, level) for _ in range(config.layers)])
        resnet = kind.startswith("Resnet") or (kind == "AttnDownBlock2D" and config.downsample_type == "resnet")
        self.downsamplers = None
        if level < len(config.channels) - 1:
            down = residual(config, channels, channels, resample=halve) if resnet else None
            self.downsamplers = nn.ModuleList([down or Downsample(channels, config.downsample_padding)])

    def forward(
        self, x: Image, emb: Embedding, context: Context | None, skips: list[Tensor], image: Result | None
    ) -> tuple[Result, Result | None]:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, context)
            skips.append(x)
        if self.downsamplers is not None:
            down = self.downsamplers[0]
            x = down(x, emb) if isinstance(down, ResidualBlock) else down(x)
            skips.append(x)
        return x, image


class MiddleBlock(Block):
    """The bottom: a residual block, an attention where there is one, and another residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, scale_out = config.channels[-1], config.mid_block_scale_factor
        settings = {"groups": config.groups(channels), "scale_out": scale_out}
        self.resnets = nn.ModuleList([residual(config, channels, channels, **settings) for _ in range(2)])
        if config.middle == "attention":
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.groups(channels)
            if config.context_dim is None:
                middle: nn.Module = self_attention(config, channels, groups, scale_out)
            else:
                middle = transformer(config, len(config.channels) - 1)
            self.attentions = nn.ModuleList([middle])

    def forward(self, x: Image, emb: Embedding, context: Context | None) -> Result:
        return self.resnets[1](self.layer(0, x, emb, context), emb)


class UpBlock(Block):
    """One level on the way up: UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D, CrossAttnUpBlock2D.

    Arguments:
        config: The network's.
        kind: One of those names.
        level: The level, counted from the top.
    """

    def __init__(self, config: UNetConfig, kind: str, level: int) -> None:
        super().__init__()
        channels = config.channels[level]
        self.resnets = nn.ModuleList([residual(config, i + j, channels) for i, j in up_widths(config, level)])
        if "Attn" in kind:
            self.attentions = nn.ModuleList([attention(config, kind, level) for _ in self.resnets])
        resnet = kind.startswith("Resnet") or (kind == "AttnUpBlock2D" and config.upsample_type == "resnet")
        self.upsamplers = None
        if level > 0:
            up = residual(config, channels, channels, resample=double) if resnet else None
            self.upsamplers = nn.ModuleList([up or Upsample(channels)])

    def forward(
        self, x: Image, emb: Embedding, context: Context | None, skips: list[Tensor], image: Result | None
    ) -> tuple[Result, Result | None]:
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, repeated(skips.pop(), len(x))], 1), emb, context)
        if self.upsamplers is not None:
            up = self.upsamplers[0]
            x = up(x, emb, skips[-1]) if isinstance(up, ResidualBlock) else up(x, skips[-1])
        return x, image


def up_widths(config: UNetConfig, level: int) -> list[tuple[int, int]]:
    """Return the channels of the state and of the skip that each residual block on the way up is given."""
    channels = config.channels
    below, above = channels[min(level + 1, len(channels) - 1)], channels[max(level - 1, 0)]
    states = [below] + [channels[level]] * config.layers
    skips = [channels[level]] * config.layers + [above]
    return list(zip(states, skips, strict=True))
