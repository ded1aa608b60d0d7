"""What a tiny autoencoder is made of, and the same in the words of diffusers' config.json.

References:
    AutoencoderTiny
    https://huggingface.co/docs/diffusers/api/models/autoencoder_tiny
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks.autoencoder_config import SCALING
from reverie.networks.unet_config import Width, known_settings, sentence

KIND = "AutoencoderTiny"
MOST_BLOCKS = 256

RENAMED = {
    "num_encoder_blocks": "encoder_blocks",
    "num_decoder_blocks": "decoder_blocks",
    "encoder_block_out_channels": "encoder_channels",
    "decoder_block_out_channels": "decoder_channels",
}
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "act_fn": "relu",
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "latent_magnitude": 3,
    "latent_shift": 0.5,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "force_upcast": (False,),
}

Blocks = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_BLOCKS)], ...], Field(min_length=1, max_length=12)]


class TinyAutoencoderConfig(BaseModel):
    """The settings of a tiny autoencoder.

    Example:
        >>> TinyAutoencoderConfig(latent_channels=16).factor
        8
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 3
    """Channels of the image that is encoded."""
    out_channels: Width = 3
    """Channels of the image that is decoded."""
    latent_channels: Width = 4
    """Channels of the latents."""
    encoder_channels: Width = 64
    """Channels of the encoder, the same at every level."""
    decoder_channels: Width = 64
    """Channels of the decoder."""
    encoder_blocks: Blocks = (1, 3, 3, 3)
    """Blocks of the encoder at each level, from the full size down."""
    decoder_blocks: Blocks = (3, 3, 3, 1)
    """Blocks of the decoder at each level, from the latents up; as many levels as the encoder has."""
    act_fn: Literal["relu", "silu", "swish", "mish", "gelu"] = "relu"
    """The activation within the blocks; that at their end is always ReLU."""
    norm: bool = False
    """Whether the blocks nearest to the latents have a branch with a group norm, as taef2 has them."""
    latent_magnitude: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Half the range that latents have when they are shown as a picture, for the record."""
    latent_shift: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.5
    """Where zero lies in that picture, for the record."""

    @property
    def factor(self) -> int:
        """How many pixels a side of one pixel of the latents stands for."""
        return 1 << (len(self.encoder_blocks) - 1)

    @model_validator(mode="after")
    def _check(self) -> "TinyAutoencoderConfig":
        down, up = len(self.encoder_blocks), len(self.decoder_blocks)
        if down != up:
            raise ValueError(f"encoder_blocks has {down} levels and decoder_blocks {up}; give both as many")
        return self

    # diffusers --------------------------------------------------------------------------------

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TinyAutoencoderConfig":
        """Read the config.json of an AutoencoderTiny; how it scales its latents is left to the codec.

        Raises:
            ModelFileError: It asks for something that is not supported; the message names it.

        Example:
            >>> TinyAutoencoderConfig.from_diffusers({"latent_channels": 16}).latent_channels
            16
        """
        if (kind := config.get("_class_name", KIND)) != KIND:
            raise ModelFileError(f"the autoencoder is a {kind}; it must be an {KIND}")
        # block_out_channels is written by diffusers beside the decoder's, as a copy.
        given = {name: value for name, value in config.items() if name not in (*SCALING, "block_out_channels")}
        settings = known_settings(KIND, given, DEFAULTS, NEUTRAL)
        for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
            settings[name] = _one_width(settings[name], name, settings[f"num_{name[:7]}_blocks"])
        if isinstance(settings["act_fn"], str):
            settings["act_fn"] = settings["act_fn"].lower()
        try:
            return cls(**{RENAMED.get(name, name): value for name, value in settings.items()})
        except ValidationError as error:
            raise ModelFileError(f"the config of this {KIND} is not supported: {sentence(error, RENAMED)}") from None

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config.json of the same network in diffusers, without how its latents are scaled.

        Raises:
            UsageError: AutoencoderTiny has no words for it.

        Example:
            >>> TinyAutoencoderConfig(encoder_blocks=(1, 1), decoder_blocks=(1, 1)).to_diffusers()["block_out_channels"]
            [64, 64]
        """
        if self.norm:
            raise UsageError(f"diffusers' {KIND} has no norm in its blocks; keep this one in reverie's own format")
        theirs: dict[str, Any] = {name: getattr(self, RENAMED.get(name, name)) for name in DEFAULTS}
        levels = len(self.encoder_blocks)
        for half, width in (("encoder", self.encoder_channels), ("decoder", self.decoder_channels)):
            theirs[f"{half}_block_out_channels"] = [width] * levels
        theirs["block_out_channels"] = theirs["decoder_block_out_channels"]
        return {"_class_name": KIND} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()
        }


def _one_width(channels: Any, name: str, blocks: Any) -> Any:
    """Return the width of all levels: the convolutions between them change no width, so that there is one."""
    if not isinstance(channels, Sequence) or isinstance(channels, str) or not channels:
        raise ModelFileError(f"{name} is {channels!r}; it must be a list of widths")
    if any(width != channels[0] for width in channels):
        raise ModelFileError(f"{name} is {list(channels)}; levels that differ in width do not fit together")
    if isinstance(blocks, Sequence) and len(blocks) != len(channels):
        raise ModelFileError(f"{name} has {len(channels)} levels, and there are blocks for {len(blocks)}")
    return channels[0]
