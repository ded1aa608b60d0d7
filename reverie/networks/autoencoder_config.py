"""What an autoencoder is made of, and the same in the words of diffusers' config.json.

References:
    AutoencoderKL
    https://huggingface.co/docs/diffusers/api/models/autoencoderkl
"""

from collections.abc import Mapping
from math import gcd
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reverie.base.errors import ModelFileError
from reverie.networks.unet_config import MAX_LAYERS, Width, known_settings, sentence

KIND = "AutoencoderKL"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

RENAMED = {"block_out_channels": "channels", "layers_per_block": "layers", "mid_block_add_attention": "attention"}

# Settings with diffusers' defaults; the block types say no more than how many levels there are.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (DOWN,),
    "up_block_types": (UP,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

# How the latents are scaled stands in the same file, but is no affair of the network: a codec reads it.
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class AutoencoderConfig(BaseModel):
    """The settings of an autoencoder. Names that diffusers has are diffusers' own, with its meaning.

    Example:
        >>> config = AutoencoderConfig(channels=(32, 64, 64, 64), latent_channels=4)
        >>> config.factor, config.norm_num_groups
        (8, 32)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 3
    """Channels of the image that is encoded."""
    out_channels: Width = 3
    """Channels of the image that is decoded: as many as encoded, unless said otherwise."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=12)] = (128, 256, 512, 512)
    """Channels at each level, from the full size down; each level after the first halves the size."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Residual blocks at each level of the encoder; the decoder has one more."""
    latent_channels: Width = 4
    """Channels of the latents."""
    attention: bool = True
    """Whether the middle of the encoder and that of the decoder attend."""
    use_quant_conv: bool = True
    """A 1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    """The activation within the residual blocks; that before the last convolution is always SiLU."""
    norm_num_groups: Annotated[int, Field(ge=1, le=16384)] = 32
    """Groups of a norm: unless given, the largest number up to 32 that divides the channels of every level."""
    sample_size: Annotated[int, Field(ge=1, le=65536)] | tuple[int, int] | None = None
    """The size of the images that it was trained on, for the record: the network takes any size."""
    force_upcast: bool = True
    """Whether it is known to overflow in float16, for the record: a codec sees that for itself."""

    @property
    def factor(self) -> int:
        """How many pixels a side of one pixel of the latents stands for."""
        return 1 << (len(self.channels) - 1)

    @property
    def encoded(self) -> tuple[int, int]:
        """Channels of what the encoder gives, and after the 1x1 convolution: a mean and a log-variance of each."""
        return 2 * self.latent_channels, 2 * self.latent_channels

    @property
    def decoded(self) -> tuple[int, int]:
        """Channels of the latents, and of what the decoder is given."""
        return self.latent_channels, self.latent_channels

    @model_validator(mode="after")
    def _settle(self) -> "AutoencoderConfig":
        """Fill in what follows from other settings, and check the whole."""
        if "out_channels" not in self.model_fields_set:
            self.__dict__["out_channels"] = self.in_channels
        if "norm_num_groups" not in self.model_fields_set:
            self.__dict__["norm_num_groups"] = max(g for g in range(1, 33) if gcd(*self.channels) % g == 0)
        for channels in self.channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups is {self.norm_num_groups}, which does not divide {channels} channels"
                )
        if len(self.channels) * (2 * self.layers + 1) > MAX_LAYERS:
            raise ValueError(f"{len(self.channels)} levels of {self.layers} layers are more than {MAX_LAYERS} blocks")
        return self

    # diffusers --------------------------------------------------------------------------------

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """Read the config.json of an AutoencoderKL; how it scales its latents is left to the codec.

        Raises:
            ModelFileError: It asks for something that is not supported; the message names it.

        Example:
            >>> AutoencoderConfig.from_diffusers({"block_out_channels": [32, 64], "layers_per_block": 2,
            ...     "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}).factor
            2
        """
        if (kind := config.get("_class_name", KIND)) != KIND:
            raise ModelFileError(f"the autoencoder is a {kind}; it must be an {KIND}")
        settings = known_settings(KIND, {k: v for k, v in config.items() if k not in SCALING}, DEFAULTS, {})
        check_blocks(settings)
        if isinstance(settings["act_fn"], str):
            settings["act_fn"] = settings["act_fn"].lower()
        ours = {RENAMED.get(name, name): value for name, value in settings.items() if "block_types" not in name}
        try:
            return cls(**ours)
        except ValidationError as error:
            raise ModelFileError(f"the config of this {KIND} is not supported: {sentence(error, RENAMED)}") from None

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config.json of the same network in diffusers, without how its latents are scaled.

        Example:
            >>> AutoencoderConfig(channels=(32, 64)).to_diffusers()["up_block_types"]
            ['UpDecoderBlock2D', 'UpDecoderBlock2D']
        """
        levels = len(self.channels)
        types = {"down_block_types": [DOWN] * levels, "up_block_types": [UP] * levels}
        theirs = {name: getattr(self, RENAMED.get(name, name)) for name in DEFAULTS if name not in types}
        return {"_class_name": KIND} | plain(theirs) | types


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them, without a size where there is none: diffusers divides by it."""
    settings = {name: value for name, value in settings.items() if name != "sample_size" or value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def check_blocks(settings: Mapping[str, Any]) -> None:
    """Refuse blocks other than the two that every such autoencoder in use is made of, or too few of them."""
    channels = settings["block_out_channels"]
    for name, kind in (("down_block_types", DOWN), ("up_block_types", UP)):
        types = settings[name]
        if not isinstance(types, list | tuple) or any(t != kind for t in types):
            raise ModelFileError(f"{name} is {types!r}; it must be a list of {kind}")
        if isinstance(channels, list | tuple) and len(channels) != len(types):
            raise ModelFileError(f"block_out_channels has {len(channels)} levels and {name} {len(types)}")
