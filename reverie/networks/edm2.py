r"""EDM2's network: a U-Net whose every layer keeps the magnitude of its activations, weights and updates.

    emb = mp_silu(mp_sum(W_c fourier(c), W_l sqrt(n) onehot(label), 1/2))                                   (1)
    encoder block:  x = pixel_norm(skip(resample(x))),    r = x;    decoder block:  x = resample(x),    r = skip(x)
        y = W_2 drop(mp_silu(W_1 mp_silu(x) * (1 + g W_e emb))),    x = mp_sum(r, y, 0.3)                       (2)
        x = mp_sum(x, attention(x), 0.3) where the block attends;    x within +-256                           (3)
    network:  [x, 1] -> conv -> encoder -> decoder, each of its blocks at mp_cat(x, the skip) -> g_out conv  (4)

where the gains g start at 0, the skip is a 1x1 convolution where the channels change, and the constant channel of
ones stands for the biases that there are none of. The numbers of blocks are the paper's: going down, one that
halves and `layers` at each level; at the bottom one that attends and one that does not; going up, one that doubles
and `layers` + 1 at each level, each of which takes one of the states that the way down left.

Any size is taken: an odd one is halved upwards, and the doubled image is cropped to what it came from.

References:
    Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2023), figure 21 and table 6
    https://arxiv.org/abs/2312.02696
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reverie.base.errors import UsageError
from reverie.networks.checks import check_images, check_label
from reverie.networks.edm2_layers import (
    CosineAttention,
    MPFourier,
    MPWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)
from reverie.networks.layers import AnyImage, SizeOf, crop, double, halve

Width = Annotated[int, Field(ge=1, le=16384)]
Share = Annotated[float, Field(gt=0, lt=1)]

# Channels of the first level of the paper's networks for 64x64 pixels or latents; the next ones have 2, 3, 4 times as
# many. And their reference learning rates.
SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
RATES = {"xs": 0.012, "s": 0.010, "m": 0.009, "l": 0.008, "xl": 0.007, "xxl": 0.0065}


class EDM2Config(BaseModel):
    """The settings of EDM2's network.

    Example:
        >>> EDM2Config(in_channels=1, channels=(32, 64)).attention
        (False, True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 3
    """Channels of the images that are given."""
    out_channels: Width = 3
    """Channels of the images that are returned: as many as given, unless said otherwise."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (128, 256, 384, 512)
    """Channels of each level."""
    layers: Annotated[int, Field(ge=1, le=16)] = 3
    """Blocks a level on the way down, without the one that halves."""
    attention: Annotated[tuple[bool, ...], Field(max_length=8)] = ()
    """Which levels attend; the lower half of them, unless said otherwise. The first block at the bottom always does."""
    head_dim: Width = 64
    """Least channels of an attention head; a level has as many heads as that allows and its channels divide by."""
    noise_channels: Width | None = None
    """Fourier features of the clock; the first level's channels, unless said otherwise."""
    emb_channels: Width | None = None
    """Width of the embedding; the largest number of channels, unless said otherwise."""
    num_class_embeds: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Number of labels; a label is one of 0 .. num_class_embeds - 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout within the blocks."""
    label_share: Share = 0.5
    """t of the sum of the clock's and the label's embeddings."""
    residual_share: Share = 0.3
    """t of the residual branches' sums."""
    attention_share: Share = 0.3
    """t of the attentions' sums."""
    skip_share: Share = 0.5
    """t of the concatenations with what the way down left."""
    clip: Annotated[float, Field(gt=0)] = 256.0
    """The range that activations are kept within, for arithmetic in half precision."""

    @model_validator(mode="after")
    def _settle(self) -> "EDM2Config":
        if "out_channels" not in self.model_fields_set:
            self.__dict__["out_channels"] = self.in_channels
        levels = len(self.channels)
        if not self.attention:
            self.__dict__["attention"] = tuple(level >= levels // 2 for level in range(levels))
        if len(self.attention) != levels:
            raise ValueError(f"attention names {len(self.attention)} levels, channels {levels}")
        return self

    def heads(self, channels: int) -> int:
        """Return the number of attention heads of so many channels."""
        return next(n for n in range(max(1, channels // self.head_dim), 0, -1) if channels % n == 0)

    @property
    def embedding(self) -> int:
        """Width of the embedding."""
        return self.emb_channels or max(self.channels)


def sized(size: Literal["xs", "s", "m", "l", "xl", "xxl"], channels: int = 4, labels: int | None = 1000) -> EDM2Config:
    """Return one of the paper's networks for 64x64: attention at 16x16 and 8x8, 3 blocks a level.

    Arguments:
        size: Its name in the paper.
        channels: Channels of the images: 4 for latents, 3 for RGB.
        labels: Number of labels.

    Example:
        >>> sized("s").channels
        (192, 384, 576, 768)
    """
    widths = tuple(SIZES[size] * factor for factor in (1, 2, 3, 4))
    return EDM2Config(in_channels=channels, channels=widths, num_class_embeds=labels)


class EDM2Block(nn.Module):
    """One block: equations (2) and (3).

    Arguments:
        config: The network's.
        inputs: Channels in, those of a skip among them.
        outputs: Channels out.
        side: Of the encoder, or of the decoder.
        resample: "halve" or "double" before it, or neither.
        attends: With attention after it.
        takes_skip: Whether x is to be concatenated with a state of the encoder.
    """

    def __init__(
        self,
        config: EDM2Config,
        inputs: int,
        outputs: int,
        side: Literal["encoder", "decoder"],
        resample: Literal["halve", "double"] | None = None,
        attends: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.side, self.resample, self.takes_skip = config, side, resample, takes_skip
        self.outputs = outputs
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_1 = MPWeight(outputs if side == "encoder" else inputs, outputs, kernel=3)
        self.emb_linear = MPWeight(config.embedding, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = MPWeight(outputs, outputs, kernel=3)
        self.conv_skip = MPWeight(inputs, outputs, kernel=1) if inputs != outputs else None
        self.attention = CosineAttention(outputs, config.heads(outputs)) if attends else None

    def forward(self, x: AnyImage, emb: Float[Tensor, "b e"], like: SizeOf | None = None) -> AnyImage:
        """Return the block's output; a doubled x is cropped to the size of `like`."""
        x = self.resized(x, like)
        if self.side == "encoder":
            x = pixel_norm(self.skipped(x))
        y = self.conv_1(mp_silu(x))
        scale = 1 + self.emb_linear(emb, self.emb_gain)[:, :, None, None]
        y = self.conv_2(self.dropout(mp_silu(y * scale)))
        if self.side == "decoder":
            x = self.skipped(x)
        x = mp_sum(x, y, self.config.residual_share)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), self.config.attention_share)
        return x.clamp(-self.config.clip, self.config.clip)

    def resized(self, x: AnyImage, like: SizeOf | None) -> AnyImage:
        """Return x halved, or doubled and cropped, or as it is."""
        if self.resample == "halve":
            return halve(x)
        if self.resample == "double":
            x = double(x)
        return x if like is None else crop(x, like)

    def skipped(self, x: AnyImage) -> AnyImage:
        """Return x with as many channels as the block gives."""
        return x if self.conv_skip is None else self.conv_skip(x)


class EDM2(nn.Module):
    """EDM2's network: images and one clock for each in, images out, zero before training.

    Arguments:
        config: What it is made of.

    Example:
        >>> network = EDM2(EDM2Config(in_channels=1, channels=(8, 16), layers=1, num_class_embeds=11))
        >>> network(torch.randn(2, 1, 13, 7), time=torch.tensor([-1.0, 0.5]), label=torch.tensor([3, 10])).shape
        torch.Size([2, 1, 13, 7])
    """

    Config = EDM2Config

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        noise = config.noise_channels or config.channels[0]
        self.fourier = MPFourier(noise)
        self.emb_noise = MPWeight(noise, config.embedding)
        self.emb_label = None
        if config.num_class_embeds is not None:
            self.emb_label = MPWeight(config.num_class_embeds, config.embedding)
        self.conv_in = MPWeight(config.in_channels + 1, config.channels[0], kernel=3)
        down = self._down()
        self.encoder = nn.ModuleList(down)
        self.decoder = nn.ModuleList(self._up([config.channels[0], *(block.outputs for block in down)]))
        self.conv_out = MPWeight(config.channels[0], config.out_channels, kernel=3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def _down(self) -> list[EDM2Block]:
        config, now, blocks = self.config, self.config.channels[0], []
        for level, (channels, attends) in enumerate(zip(config.channels, config.attention, strict=True)):
            if level > 0:
                blocks.append(EDM2Block(config, now, now, "encoder", "halve"))
            for _ in range(config.layers):
                blocks.append(EDM2Block(config, now, channels, "encoder", attends=attends))
                now = channels
        return blocks

    def _up(self, states: list[int]) -> list[EDM2Block]:
        """Return the decoder's blocks, given the channels of the states that the encoder leaves, from the last on."""
        config, now = self.config, self.config.channels[-1]
        blocks = [EDM2Block(config, now, now, "decoder", attends=attends) for attends in (True, False)]
        for level in reversed(range(len(config.channels))):
            channels, attends = config.channels[level], config.attention[level]
            if level < len(config.channels) - 1:
                blocks.append(EDM2Block(config, now, now, "decoder", "double"))
            for _ in range(config.layers + 1):
                inputs = now + states.pop()
                blocks.append(EDM2Block(config, inputs, channels, "decoder", attends=attends, takes_skip=True))
                now = channels
        return blocks

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Real[Tensor, " b"], label: Real[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b out h w"]:
        """Return one image for each of the images x, at their clocks.

        Arguments:
            x: Images (B, C, H, W) of any size, of magnitude 1 (c_in x).
            time: The clock of each (B,), ln(sigma) / 4.
            label: One class for each (B,), where the config has classes.

        Raises:
            UsageError: Something is missing, is not wanted, or has the wrong shape.
        """
        self._check(x, time, label)
        emb = self._embed(time, label, x.dtype)
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], 1))
        states = [x]
        for block in self.encoder:
            x = self._block(block, x, emb)
            states.append(x)
        for block in self.decoder:
            if block.takes_skip:
                x = mp_cat(x, states.pop(), self.config.skip_share)
            x = self._block(block, x, emb, states[-1] if states else None)
        return self.conv_out(x, self.out_gain)

    def _block(self, block: nn.Module, x: Tensor, emb: Tensor, like: Tensor | None = None) -> Tensor:
        like = like if getattr(block, "resample", None) == "double" else None
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, like, use_reentrant=False)
        return block(x, emb, like)

    def _embed(self, time: Tensor, label: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "b e"]:
        """Return the embedding of clock and label, activated: equation (1)."""
        emb = self.emb_noise(self.fourier(time).to(dtype))
        if label is not None and self.emb_label is not None:
            count = self.emb_label.weight.shape[1]
            onehot = F.one_hot(label.long(), count).to(dtype) * math.sqrt(count)
            emb = mp_sum(emb, self.emb_label(onehot), self.config.label_share)
        return mp_silu(emb)

    def _check(self, x: Tensor, time: Tensor, label: Tensor | None) -> None:
        config, count = self.config, len(x)
        check_images(x, time, config.in_channels)
        check_label(label, (count,) if self.emb_label is not None else None)
        if label is None or config.num_class_embeds is None:
            return
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = label[(label < 0) | (label >= config.num_class_embeds) | (label != label.long())]
            if len(wrong):
                raise UsageError(f"label {wrong[0].item()} is not one of 0 .. {config.num_class_embeds - 1}")
