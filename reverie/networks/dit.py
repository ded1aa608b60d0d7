r"""A transformer over the patches of an image, whose norms are told the time: DiT with adaLN-zero.

    x_0 = W_p patches + position,    emb = MLP(features(time)) + embedding(label)                            (1)
    a_1, b_1, g_1, a_2, b_2, g_2 = W_c silu(emb)
    x = x + g_1 attention(norm(x) (1 + b_1) + a_1),    x = x + cross_attention(norm'(x), context),
    x = x + g_2 mlp(norm(x) (1 + b_2) + a_2)    for each block                                               (2)
    out = patches of  W_o (norm(x) (1 + b) + a),    a, b = W_f silu(emb)                                     (3)

where W_c, W_f, W_o and the end of the cross-attention start at zero: each block is the identity before training, and
the output is zero. The position is fixed, sines and cosines of a patch's column and row, so that any size is taken; an
image whose sides the patch does not divide is continued with zeros, and the result cropped.

References:
    Scalable Diffusion Models with Transformers (Peebles & Xie, 2023), section 3.2
    https://arxiv.org/abs/2212.09748
    PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis (Chen et al., 2023)
    https://arxiv.org/abs/2310.00426
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reverie.networks.attention import Attention, Tokens
from reverie.networks.checks import check_context, check_images, check_label
from reverie.networks.layers import Linear, Sinusoids, TimeEmbedding, checked, zeroed
from reverie.networks.unet import with_channels

Width = Annotated[int, Field(ge=1, le=16384)]

FEATURES = 256  # of the time


class DiTConfig(BaseModel):
    """The settings of a diffusion transformer.

    Example:
        >>> DiTConfig(in_channels=1, width=64, heads=4).out_channels
        1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 3
    """Channels of the images that are given."""
    out_channels: Width = 3
    """Channels of the images that are returned: as many as given, unless said otherwise."""
    patch: Annotated[int, Field(ge=1, le=64)] = 2
    """Pixels a side of a patch."""
    width: Annotated[int, Field(ge=4, le=16384, multiple_of=4)] = 384
    """Channels of a patch inside."""
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    """Blocks."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 6
    """Heads of the attention."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """How many times as wide the mlp is inside."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout within the mlp."""
    num_class_embeds: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rows of the class embedding; a label is one of 0 .. num_class_embeds - 1."""
    class_embed_type: Literal["identity"] | None = None
    """With identity a label is no class but an embedding (B, width), which is added."""
    context_dim: Width | None = None
    """Channels of a context that the blocks attend to; None for none."""

    @model_validator(mode="after")
    def _settle(self) -> "DiTConfig":
        if "out_channels" not in self.model_fields_set:
            self.__dict__["out_channels"] = self.in_channels
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; heads, {self.heads}, must divide it")
        if self.class_embed_type and self.num_class_embeds:
            raise ValueError("class_embed_type identity takes embeddings; leave num_class_embeds out")
        return self

    @property
    def takes_label(self) -> bool:
        """Whether each image comes with a label."""
        return self.num_class_embeds is not None or self.class_embed_type is not None

    @property
    def time_channels(self) -> int:
        """Channels of the embedding of the time."""
        return self.width


class MLP(nn.Module):
    """W_2 drop(gelu(W_1 x)), with gelu by tanh; the places are those of diffusers' feed-forward."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleList([Linear(channels, hidden), nn.Dropout(dropout), Linear(hidden, channels)])

    def forward(self, x: Tokens) -> Tokens:
        first, drop, last = self.net
        return last(drop(F.gelu(first(x), approximate="tanh")))


class DiTBlock(nn.Module):
    """One block: equation (2)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(Linear(width, 6 * width))
        self.attn1 = Attention(width, config.heads, head)
        self.attn1.over_pixels = True
        self.norm2 = self.attn2 = None
        if config.context_dim is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, config.heads, head, config.context_dim)
            zeroed(self.attn2.to_out)
        self.ff = MLP(width, round(config.mlp_ratio * width), config.dropout)

    def forward(self, x: Tokens, emb: Float[Tensor, "b c"], context: Float[Tensor, "b l d"] | None = None) -> Tokens:
        """Return the tokens (B, N, C) after the block, told of the activated embedding (B, C) and the context."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(emb)[:, None].chunk(6, -1)
        x = x + gate * self.attn1(torch.addcmul(shift, self.norm(x), 1 + scale))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + gate_ff * self.ff(torch.addcmul(shift_ff, self.norm(x), 1 + scale_ff))


class DiT(nn.Module):
    """A diffusion transformer: images and one time for each in, images out, zero before training.

    Arguments:
        config: What it is made of.

    Example:
        >>> net = DiT(DiTConfig(in_channels=1, width=16, depth=2, heads=2, num_class_embeds=11))
        >>> net(torch.randn(2, 1, 13, 7), time=torch.tensor([1.0, 999.0]), label=torch.tensor([3, 10])).shape
        torch.Size([2, 1, 13, 7])
    """

    Config = DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing, width = config, False, config.width
        self.patches = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.time_proj = Sinusoids(FEATURES, cos_first=True, shift=1.0)
        self.time_embedding = TimeEmbedding(FEATURES, width)
        self.class_embedding = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, width)
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = zeroed(Linear(width, 2 * width))
        self.proj_out = zeroed(Linear(width, config.patch**2 * config.out_channels))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Real[Tensor, " b"],
        label: Real[Tensor, "b ..."] | None = None,
        context: Float[Tensor, "b l d"] | None = None,
        beside: Float[Tensor, "b k h w"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        """Return one image for each of the images x, at their times.

        Arguments:
            x: Images (B, C, H, W) of any size.
            time: One time for each (B,), not necessarily a whole number.
            label: One class for each (B,), where the config has classes; with class_embed_type "identity" an
                embedding (B, width).
            context: What the blocks attend to (B, L, D), where the config has context_dim.
            beside: Further channels of the images (B, K, H, W), where in_channels counts them too.

        Raises:
            UsageError: Something is missing, is not wanted, or has the wrong shape.
        """
        x = x if beside is None else with_channels(x, beside)
        self._check(x, time, label, context)
        height, width = x.shape[2:]
        patch = self.config.patch
        x = self.patches(F.pad(x, (0, -width % patch, 0, -height % patch)))
        rows, columns = x.shape[2:]
        emb = F.silu(self._embed(time, label))
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2) + positions(rows, columns, self.config.width).to(x)
        for block in self.blocks:
            tokens = self._block(block, tokens, emb, context)
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, -1)
        tokens = self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))
        pixels = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
        image = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return image[:, :, :height, :width]

    def _block(self, block: nn.Module, tokens: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, emb, context, use_reentrant=False)
        return block(tokens, emb, context)

    def _embed(self, time: Tensor, label: Tensor | None) -> Float[Tensor, "b c"]:
        """Return the embedding of the time and of the label: equation (1)."""
        emb = self.time_embedding(self.time_proj(time))
        if label is None:
            return emb
        if self.class_embedding is None:
            return emb + label.to(emb.dtype)
        return emb + self.class_embedding(checked(label, self.class_embedding, "label"))

    def _check(self, x: Tensor, time: Tensor, label: Tensor | None, context: Tensor | None) -> None:
        config, count = self.config, len(x)
        check_images(x, time, config.in_channels)
        width = (config.width,) if config.class_embed_type else ()
        check_label(label, (count, *width) if config.takes_label else None)
        check_context(context, count, config.context_dim)


def positions(rows: int, columns: int, width: int) -> Float[Tensor, "n c"]:
    r"""Return the position (rows columns, width) of each patch: sines and cosines of its column, then of its row.

    f_k = 10000^(-k / n), k = 0 .. n - 1, n = width / 4;    [sin(c f), cos(c f), sin(r f), cos(r f)]         (4)

    Arguments:
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        width: Channels, a multiple of four.

    Example:
        >>> positions(1, 2, 4)[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    quarter = width // 4
    frequency = torch.exp(-math.log(10000) / quarter * torch.arange(quarter, dtype=torch.float64))
    column, row = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in (columns, rows))
    column, row = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (column, row))
    both = column.expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)
    return torch.cat(both, 2).flatten(0, 1).float()
