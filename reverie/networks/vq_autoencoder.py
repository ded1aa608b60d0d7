r"""The autoencoder with a codebook: each pixel of the latents is, when it is decoded, the nearest of K vectors.

    z = quant(encoder(x)),    x' = decoder(post_quant(e_k)),    k = argmin_j |z - e_j|                       (1)

Diffusion goes through z, which is any point; what it ends in is taken to the codebook by the decoder. That is how the
first latent diffusion models were made (VQ-f4 of CelebA-HQ, FFHQ and the bedrooms).

Its parameters have the names and shapes of diffusers' VQModel.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.1, table 8
    https://arxiv.org/abs/2112.10752
    Neural Discrete Representation Learning (van den Oord et al., 2017), eq. 1 and 2
    https://arxiv.org/abs/1711.00937
    VQModel
    https://huggingface.co/docs/diffusers/api/models/vq
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int64
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from reverie.base.errors import ModelFileError
from reverie.networks.autoencoder import ConvolutionalAutoencoder, check_channels
from reverie.networks.autoencoder_config import (
    DEFAULTS,
    DOWN,
    RENAMED,
    SCALING,
    UP,
    AutoencoderConfig,
    check_blocks,
    plain,
)
from reverie.networks.unet_config import Width, known_settings, sentence

KIND = "VQModel"
OURS = {**RENAMED, "num_vq_embeddings": "entries", "vq_embed_dim": "latent_channels", "latent_channels": "inner"}
THEIR_DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in DEFAULTS.items() if not name.startswith("use_")},
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "force_upcast": False,
}
ALWAYS = {"norm_type": ("group",), "lookup_from_codebook": (False,)}  # the other norm makes another decoder


class VQConfig(AutoencoderConfig):
    """The settings of an autoencoder with a codebook.

    Example:
        >>> VQConfig(channels=(32, 64), latent_channels=3, entries=512).inner
        3
    """

    entries: Annotated[int, Field(ge=1, le=1 << 20)] = 8192
    """Vectors in the codebook."""
    inner: Width = 3
    """Channels between the encoder and its 1x1 convolution, and between the other and the decoder: as the latents'."""

    @property
    def encoded(self) -> tuple[int, int]:
        """Channels of what the encoder gives, and of the latents."""
        return self.inner, self.latent_channels

    @property
    def decoded(self) -> tuple[int, int]:
        """Channels of the latents, and of what the decoder is given."""
        return self.latent_channels, self.inner

    @model_validator(mode="after")
    def _complete(self) -> "VQConfig":
        """Fill in what follows from other settings; both convolutions are always there."""
        if "inner" not in self.model_fields_set:
            self.__dict__["inner"] = self.latent_channels
        if not (self.use_quant_conv and self.use_post_quant_conv):
            raise ValueError("an autoencoder with a codebook has both 1x1 convolutions")
        return self

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VQConfig":
        """Read the config.json of a VQModel.

        Raises:
            ModelFileError: It asks for something that is not supported; the message names it.

        Example:
            >>> VQConfig.from_diffusers({"block_out_channels": [32, 64], "num_vq_embeddings": 64, "vq_embed_dim": 4,
            ...     "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}).inner
            3
        """
        given = {name: value for name, value in config.items() if name not in SCALING}
        settings = known_settings(KIND, given, THEIR_DEFAULTS, ALWAYS)
        check_blocks(settings)
        if settings["vq_embed_dim"] is None:
            settings["vq_embed_dim"] = settings["latent_channels"]
        try:
            return cls(**{OURS.get(name, name): v for name, v in settings.items() if "block_types" not in name})
        except ValidationError as error:
            raise ModelFileError(f"the config of this {KIND} is not supported: {sentence(error, OURS)}") from None

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config.json of the same network in diffusers, without how its latents are scaled.

        Example:
            >>> VQConfig(channels=(32, 64), latent_channels=4).to_diffusers()["vq_embed_dim"]
            4
        """
        levels = len(self.channels)
        types = {"down_block_types": [DOWN] * levels, "up_block_types": [UP] * levels}
        theirs = {name: getattr(self, OURS.get(name, name)) for name in THEIR_DEFAULTS if name not in types}
        return {"_class_name": KIND} | plain(theirs) | types


class Codebook(nn.Module):
    """K vectors, of which the nearest stands for each pixel of the latents.

    Arguments:
        entries: How many.
        channels: Numbers in each.
    """

    def __init__(self, entries: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)

    def nearest(self, z: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b h w"]:
        """Return which vector is nearest to each pixel (B, h, w): k of (1).

        In float32, whatever the network computes in, and a row at a time, as the distances are K to a pixel.
        """
        vectors = self.embedding.weight.float()
        rows = [torch.cdist(row.float().flatten(1).T, vectors).argmin(1).view(row.shape[1:]) for row in z]
        return torch.stack(rows)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return those vectors (B, c, h, w)."""
        return self.embedding(self.nearest(z)).permute(0, 3, 1, 2).contiguous().to(z.dtype)


class VQAutoencoder(ConvolutionalAutoencoder):
    """The autoencoder with a codebook.

    Arguments:
        config: What it is made of.

    Example:
        >>> autoencoder = VQAutoencoder(VQConfig(channels=(8, 8, 8), latent_channels=3, entries=16))
        >>> latents = autoencoder.encode(torch.zeros(2, 3, 16, 12))
        >>> latents.shape, autoencoder.decode(latents).shape
        (torch.Size([2, 3, 4, 3]), torch.Size([2, 3, 16, 12]))
    """

    Config = VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.quantize = Codebook(config.entries, config.latent_channels)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the latents z of images (B, C, H, W) in [-1, 1], before they are taken to the codebook.

        Raises:
            UsageError: They are no images of as many channels as the config says.
        """
        return self.numbers(images)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the image of each row of latents, taken to the codebook: (1).

        Raises:
            UsageError: They are no latents of as many channels as the config says.
        """
        check_channels(latents, self.config.latent_channels, "latents")
        return super().decode(self.quantize(latents))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Return images encoded and decoded again, of their own size."""
        return self.decode(self.encode(images))[:, :, : images.shape[2], : images.shape[3]]
