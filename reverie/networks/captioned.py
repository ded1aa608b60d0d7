r"""A U-Net, or a transformer, that is told what to draw in words, with the encoder of the words, trained along.

    e = E[tokens] + P;    e = e + attention(norm(e)), e = e + mlp(norm(e)) for each block                     (1)
    context = norm(e),    pooled = W mean_i(context_i)                                                         (2)
    out = U(x, time, context, pooled),                                                                         (3)

where U attends to the context and adds the pooled words to its embedding of time. A place that holds no word is
a token like any other, so that no words at all are a prompt too: the empty one.

References:
    Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), section 2
    https://arxiv.org/abs/2205.11487
    GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (Nichol et al., 2022)
    https://arxiv.org/abs/2112.10741
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int64, Real
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.networks.attention import Attention, GatedMLP
from reverie.networks.dit import DiT, DiTConfig
from reverie.networks.layers import Linear, checked
from reverie.networks.unet import UNet
from reverie.networks.unet_config import UNetConfig


class WordsConfig(BaseModel):
    """The encoder of words."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vocabulary: Annotated[int, Field(ge=1, le=1_000_000)]
    """Numbers that a token may be: 0 for none, and one for each entry of the vocabulary."""
    length: Annotated[int, Field(ge=1, le=4096)]
    """Tokens of a prompt."""
    width: Annotated[int, Field(ge=1, le=16384)] = 128
    """Channels of a token."""
    blocks: Annotated[int, Field(ge=0, le=64)] = 2
    """Transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """Heads of their attention."""

    @model_validator(mode="after")
    def divides(self) -> "WordsConfig":
        """Refuse a width that the heads do not divide."""
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; heads, {self.heads}, must divide it")
        return self


class CaptionedConfig(BaseModel):
    """A network of images with an encoder of words.

    Example:
        >>> CaptionedConfig(words={"vocabulary": 9, "length": 4}, unet={"channels": (8, 16)}).inner.context_dim
        128
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    words: WordsConfig
    """The encoder."""
    unet: UNetConfig | None = None
    """A U-Net, without what the words bring to it,"""
    dit: DiTConfig | None = None
    """or a transformer."""

    @model_validator(mode="after")
    def holds_one(self) -> "CaptionedConfig":
        """Refuse no network, and two."""
        if (self.unet is None) == (self.dit is None):
            raise ValueError("there is one network of images beside the words: unet or dit")
        return self

    @property
    def inner(self) -> UNetConfig | DiTConfig:
        """The network of images with what the words bring to it."""
        given = self.unet or self.dit
        assert given is not None
        told = {"context_dim": self.words.width, "class_embed_type": "identity"}
        return type(given)(**(given.model_dump(exclude_unset=True) | told))

    @property
    def in_channels(self) -> int:
        """Channels of the image that is given."""
        return self.inner.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the image that is returned."""
        return self.inner.out_channels


class WordsBlock(nn.Module):
    """One block of (1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, width // heads)
        self.ff = GatedMLP(width)

    def forward(self, e: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        e = e + self.attn(self.norm1(e))
        return self.ff(self.norm2(e), e)


class Words(nn.Module):
    """The encoder: equations (1) and (2).

    Arguments:
        config: Its sizes.
        pooled: Channels of the pooled words.
    """

    def __init__(self, config: WordsConfig, pooled: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        self.blocks = nn.ModuleList([WordsBlock(config.width, config.heads) for _ in range(config.blocks)])
        self.norm = nn.LayerNorm(config.width)
        self.pool = Linear(config.width, pooled)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Int64[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b p"]]:
        """Return the context (B, n, width) and the pooled words (B, pooled) of tokens (B, n)."""
        e = self.embedding(checked(tokens.flatten(), self.embedding, "tokens")).unflatten(0, tokens.shape)
        e = e + self.position
        for block in self.blocks:
            e = block(e)
        context = self.norm(e)
        return context, self.pool(context.mean(1))


class Captioned(nn.Module):
    """A network of images that is told what to draw in words: equation (3).

    Arguments:
        config: What it is made of.

    Example:
        >>> net = Captioned(CaptionedConfig(words={"vocabulary": 9, "length": 4}, unet={"channels": (8, 16)}))
        >>> tokens = torch.tensor([[1, 2, 0, 0]])
        >>> net(torch.zeros(1, 3, 8, 8), torch.zeros(1), tokens=tokens).shape
        torch.Size([1, 3, 8, 8])
    """

    Config = CaptionedConfig

    def __init__(self, config: CaptionedConfig) -> None:
        super().__init__()
        self.config, inner = config, config.inner
        self.words = Words(config.words, inner.time_channels)
        if isinstance(inner, DiTConfig):
            self.dit = DiT(inner)
        else:
            self.unet = UNet(inner)

    @property
    def image(self) -> UNet | DiT:
        """The network of images."""
        return self.unet if self.config.dit is None else self.dit

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the inside of the layers is computed again for the gradients."""
        return self.image.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.image.gradient_checkpointing = on

    def encode(self, tokens: Int64[Tensor, "b n"]) -> dict[str, Tensor]:
        """Return what the words of tokens (B, n) are to the U-Net: the same at every step, so worked out once.

        Raises:
            UsageError: They are not of this network's length.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.config.words.length:
            raise UsageError(f"tokens are {tuple(tokens.shape)}; they must be (B, {self.config.words.length})")
        context, pooled = self.words(tokens)
        return {"context": context, "label": pooled}

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Real[Tensor, " b"],
        tokens: Int64[Tensor, "b n"] | None = None,
        context: Float[Tensor, "b n d"] | None = None,
        label: Float[Tensor, "b p"] | None = None,
        beside: Float[Tensor, "b k h w"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        """Return one image for each of the images x, at their times.

        Arguments:
            x: Images (B, C, H, W).
            time: One time for each (B,).
            tokens: The words of each (B, n); or, instead, what `encode` made of them:
            context: (B, n, width),
            label: and the pooled words (B, time_channels).
            beside: Channels that go in after x's (B, K, H, W), where in_channels counts them too.

        Raises:
            UsageError: Neither is given, or both.
        """
        if (tokens is None) == (context is None):
            raise UsageError("this network takes tokens, or what its encode made of them; give one of the two")
        told = {"context": context, "label": label} if tokens is None else self.encode(tokens)
        return self.image(x, time, beside=beside, **told)
