"""What a U-Net is made of, and the same in the words of diffusers' config.json.

A network is described by a few settings (channels, layers and attention of each level); the block types
that diffusers lists are derived from them, and given outright only for a plan that they cannot say. A
config bounds what it asks for, so that one from a stranger can be read before memory is taken.

References:
    UNet2DModel and UNet2DConditionModel
    https://huggingface.co/docs/diffusers/api/models/unet2d
    https://huggingface.co/docs/diffusers/api/models/unet2d-cond
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.registry import nearest

MAX_LAYERS = 4096  # residual and transformer blocks in all

Width = Annotated[int, Field(ge=1, le=16384)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
DownBlockType = Literal[
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "CrossAttnDownBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
]
UpBlockType = Literal[
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "CrossAttnUpBlock2D",
    "SkipUpBlock2D",
    "AttnSkipUpBlock2D",
]


def down_types(attention: Sequence[bool], context_dim: int | None, resample: str) -> tuple[str, ...]:
    """Return diffusers' block types on the way down, where the blocks resample by "conv" or "resnet"."""
    plain = "DownBlock2D" if resample == "conv" else "ResnetDownsampleBlock2D"
    attending = "AttnDownBlock2D" if context_dim is None else "CrossAttnDownBlock2D"
    return tuple(attending if a else plain for a in attention)


def up_types(attention: Sequence[bool], context_dim: int | None, resample: str) -> tuple[str, ...]:
    """Return diffusers' block types on the way up, from the bottom."""
    plain = "UpBlock2D" if resample == "conv" else "ResnetUpsampleBlock2D"
    attending = "AttnUpBlock2D" if context_dim is None else "CrossAttnUpBlock2D"
    return tuple(attending if a else plain for a in reversed(attention))


class UNetConfig(BaseModel):
    """The settings of a U-Net. Names that diffusers has are diffusers' own, with its meaning.

    Example:
        >>> config = UNetConfig(in_channels=1, channels=(32, 64, 64), attention=(False, True, False))
        >>> config.down_types
        ('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 3
    """Channels of the image that is given."""
    out_channels: Width = 3
    """Channels of the image that is returned: as many as given, unless said otherwise."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=12)] = (64, 128, 256)
    """Channels at each level, from the full size down; each level after the first halves the size."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Residual blocks at each level on the way down; one more on the way up."""
    attention: tuple[bool, ...] = ()
    """Whether each level attends; empty for none but the middle."""
    middle: Literal["attention", "plain", "none"] = "attention"
    """The block at the bottom: with attention, without, or none at all."""
    head_dim: Width | None = None
    """Channels of an attention head; None, with num_heads None too, for a single head."""
    num_heads: Width | None = None
    """Attention heads at every level, instead of head_dim."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout within the residual blocks."""
    num_class_embeds: Count | None = None
    """Rows of the class embedding; a label is one of 0 .. num_class_embeds - 1."""
    context_dim: Width | None = None
    """Channels of a context: the levels that attend become transformers that attend to it too."""
    transformer_layers: Annotated[int, Field(ge=1, le=64)] | tuple[Annotated[int, Field(ge=1, le=64)], ...] = 1
    """Transformer blocks where there is a context, at every level or at each."""
    use_linear_projection: bool = False
    """Linear layers at both ends of a transformer instead of 1x1 convolutions."""

    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """The time is added, or scales and shifts."""
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    """The activation."""
    norm_num_groups: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Groups of a norm: unless given, the largest number up to 32 that divides the channels of every level."""
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """What is added to a variance."""
    attn_norm_num_groups: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Groups of the norm before the attention of the middle: unless given, as all others, or no norm there
    where the time scales and shifts."""
    mid_block_scale_factor: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """What the sums of the middle are divided by."""
    downsample_type: Literal["conv", "resnet"] = "conv"
    """A convolution with stride 2, or a residual block that halves the size."""
    upsample_type: Literal["conv", "resnet"] = "conv"
    """Doubling and a convolution, or a residual block that doubles the size."""
    downsample_padding: Literal[0, 1] = 1
    """One pixel of padding all round before a convolution with stride 2, or at the right and bottom only (0)."""

    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    """Sinusoids of the time; random Fourier features of its logarithm, with the output divided by the
    time; or a row for each integer time."""
    time_embedding_dim: Width | None = None
    """Channels of the time's embedding: unless given, four times those of the first level."""
    flip_sin_to_cos: bool = True
    """Cosines before sines."""
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    """One makes the last frequency 1 / 10000 exactly."""
    num_train_timesteps: Count | None = None
    """Rows of a learned embedding of time."""
    class_embed_type: Literal["timestep", "identity"] | None = None
    """How a label is embedded where num_class_embeds is None: as a time is, or it is an embedding already."""
    addition_embed_type: Literal["text_time"] | None = None
    """With "text_time" a vector and a few numbers for each image join the time, as SDXL has it."""
    addition_time_embed_dim: Width | None = None
    """Sinusoids of each of those numbers."""
    projection_class_embeddings_input_dim: Width | None = None
    """Channels of the vector and of the numbers' sinusoids together."""
    time_cond_proj_dim: Width | None = None
    """Channels of a vector that is projected and added to the features of the time."""
    center_input_sample: bool = False
    """Take images in [0, 1] to [-1, 1] first."""
    patch: Annotated[int, Field(ge=1, le=64)] = 1
    """Pixels a side that become channels of one before the first convolution; diffusers has one alone."""
    positions: bool = False
    """Each pixel is told where in the image it is; diffusers has no such network."""

    down_block_types: tuple[DownBlockType, ...] = ()
    """The block of each level on the way down, for a plan that the settings above cannot say."""
    up_block_types: tuple[UpBlockType, ...] = ()
    """The block of each level on the way up, from the bottom; it comes with down_block_types."""
    sample_size: Annotated[int, Field(ge=1, le=65536)] | tuple[int, int] | None = None
    """The size of the images that it was trained on, for the record: the network takes any size."""
    upcast_attention: bool = False
    """Attention in float32, for the record: scaled_dot_product_attention sums in float32 as it is."""

    # Derived ----------------------------------------------------------------------------------

    @property
    def down_types(self) -> tuple[str, ...]:
        """The type of each block on the way down, in diffusers' words."""
        return self.down_block_types or down_types(self._attention, self.context_dim, self.downsample_type)

    @property
    def up_types(self) -> tuple[str, ...]:
        """The type of each block on the way up, from the bottom, in diffusers' words."""
        return self.up_block_types or up_types(self._attention, self.context_dim, self.upsample_type)

    @property
    def _attention(self) -> tuple[bool, ...]:
        return self.attention or (False,) * len(self.channels)

    @property
    def time_channels(self) -> int:
        """Channels of the time's embedding."""
        return self.time_embedding_dim or 4 * self.channels[0]

    @property
    def attended(self) -> tuple[int, ...]:
        """The channels of every block that attends, down, middle and up."""
        down = [c for c, kind in zip(self.channels, self.down_types, strict=True) if "Attn" in kind]
        up = [c for c, kind in zip(self.channels[::-1], self.up_types, strict=True) if "Attn" in kind]
        return (*down, *[self.channels[-1]] * (self.middle == "attention"), *up)

    def heads(self, channels: int) -> tuple[int, int]:
        """Return the number of heads and the channels of each, where a level has so many channels."""
        if self.num_heads is not None:
            return self.num_heads, channels // self.num_heads
        head_dim = self.head_dim or channels
        return channels // head_dim, head_dim

    def groups(self, channels: int) -> int:
        """Return the groups of the norms at the middle and at the end."""
        return self.norm_num_groups or max(1, min(channels // 4, 32))

    def depth(self, level: int) -> int:
        """Return the transformer blocks of each attention at a level."""
        depth = self.transformer_layers
        return depth if isinstance(depth, int) else depth[level]

    # Checks -----------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _settle(self) -> "UNetConfig":
        """Fill in what follows from other settings, so that a config says what is built, and check it."""
        if "out_channels" not in self.model_fields_set:
            self.__dict__["out_channels"] = self.in_channels
        if "norm_num_groups" not in self.model_fields_set:
            self.__dict__["norm_num_groups"] = max(g for g in range(1, 33) if gcd(*self.channels) % g == 0)
        problem = self._wrong_plan() or self._wrong_width() or self._without_effect()
        if problem:
            raise ValueError(problem)
        return self

    def _wrong_plan(self) -> str | None:
        levels = len(self.channels)
        depth = self.transformer_layers
        types = self.down_block_types, self.up_block_types
        if self.attention and any(types):
            return "give attention or block types, not both"
        if any(types) and not all(len(t) == levels for t in types):
            return f"there are {levels} levels of channels, {len(types[0])} of down and {len(types[1])} of up blocks"
        if len(self._attention) != levels:
            return f"attention has {len(self.attention)} levels and channels has {levels}; give one for each"
        if not isinstance(depth, int) and len(depth) != levels:
            return f"transformer_layers has {len(depth)} levels and channels has {levels}; give one for each"
        deepest = max(depth) if isinstance(depth, tuple) else depth
        if levels * (2 * self.layers + 1) * deepest > MAX_LAYERS:
            return f"{levels} levels of {self.layers} layers, {deepest} deep, are more than {MAX_LAYERS} blocks in all"
        return self._wrong_skips()

    def _wrong_skips(self) -> str | None:
        down, up = (["Skip" in kind for kind in kinds] for kinds in (self.down_types, self.up_types))
        if self.norm_num_groups is None and not all(down + up):
            return "norm_num_groups is None; only Skip blocks choose their own groups"
        if not any(down + up):
            return None
        if (self.in_channels, self.out_channels) != (3, 3):
            return f"Skip blocks are for 3 channels in and out, not {self.in_channels} and {self.out_channels}"
        if self.patch > 1:
            return f"Skip blocks carry the image itself, of which patch {self.patch} leaves none"
        if any(channels % 32 for channels in self.channels):
            return f"Skip blocks need a multiple of 32 channels at every level, not {list(self.channels)}"
        if down != sorted(down, reverse=True) or up != sorted(up):
            return "Skip blocks must be the first of the way down and the last of the way up"
        return None

    def _wrong_width(self) -> str | None:
        groups = self.norm_num_groups or 1
        for channels in self.channels:
            if channels % groups:
                return f"norm_num_groups is {groups}, which does not divide the {channels} channels of a level"
        if self.channels[-1] % (self.attn_norm_num_groups or 1):
            return f"attn_norm_num_groups is {self.attn_norm_num_groups}; it must divide {self.channels[-1]} channels"
        if self.head_dim is not None and self.num_heads is not None:
            return "give head_dim or num_heads, not both"
        exact = self.num_heads or (self.head_dim if self.context_dim is not None else None) or 1
        for channels in self.attended:
            if channels < (self.head_dim or 1) or channels % exact:
                given = f"head_dim is {self.head_dim}" if self.head_dim else f"num_heads is {self.num_heads}"
                return f"{given}, which does not fit a level of {channels} channels that attends"
        added, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if added and total and (added // 2 <= self.freq_shift or added >= total):
            return f"addition_time_embed_dim is {added}; it must be from {2 * (self.freq_shift + 1)} to {total - 1}"
        if self.time_embedding_type == "positional" and self.channels[0] // 2 <= self.freq_shift:
            least = 2 * (self.freq_shift + 1)
            return f"the first level has {self.channels[0]} channels; sinusoids of the time need at least {least}"
        return None

    def _without_effect(self) -> str | None:
        """Say which setting would be ignored."""
        cross = any("Cross" in kind for kind in self.down_types + self.up_types)
        alone = any("Attn" in kind and "Cross" not in kind for kind in self.down_types + self.up_types)
        conv = self.downsample_type == self.upsample_type == "conv"
        learned = self.time_embedding_type == "learned"
        added = (
            self.addition_embed_type,
            self.addition_time_embed_dim,
            self.projection_class_embeddings_input_dim,
            self.upcast_attention or None,
        )
        for wrong, problem in (
            (not self.attended and (self.head_dim or self.num_heads), "head_dim and num_heads need attention"),
            (cross and self.context_dim is None, "blocks that attend to a context need context_dim"),
            (self.context_dim and not self.attended, "context_dim needs attention at some level or in the middle"),
            (self.context_dim and alone, "with context_dim every block that attends is a CrossAttn block"),
            (self.context_dim and not conv, "context_dim goes with downsample_type and upsample_type 'conv'"),
            (self.context_dim and self.middle == "plain", "with context_dim the middle is 'attention' or 'none'"),
            (self.context_dim is None and self.transformer_layers != 1, "transformer_layers needs context_dim"),
            (self.context_dim is None and self.use_linear_projection, "use_linear_projection needs context_dim"),
            (self.context_dim and self.attn_norm_num_groups, "attn_norm_num_groups goes without context_dim"),
            (self.class_embed_type and self.num_class_embeds, "give num_class_embeds or class_embed_type, not both"),
            (self.context_dim and self.time_embedding_type != "positional", "context_dim goes with positional time"),
            (
                any(added) and self.context_dim is None,
                "addition_embed_type, addition_time_embed_dim, projection_class_embeddings_input_dim and "
                "upcast_attention need context_dim",
            ),
            (
                len({value is None for value in added[:3]}) > 1,
                "addition_embed_type, addition_time_embed_dim and projection_class_embeddings_input_dim come together",
            ),
            (learned and self.num_train_timesteps is None, "a learned time embedding needs num_train_timesteps"),
            (not learned and self.num_train_timesteps, "num_train_timesteps goes with a learned time embedding"),
            (
                self.attn_norm_num_groups and self.middle != "attention",
                "attn_norm_num_groups needs a middle that attends",
            ),
        ):
            if wrong:
                return problem
        return None

    # diffusers --------------------------------------------------------------------------------

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Read the config.json of a UNet2DModel, or of a UNet2DConditionModel as Stable Diffusion has it.

        Raises:
            ModelFileError: It asks for something that is not supported; the message names it.

        Example:
            >>> UNetConfig.from_diffusers({"block_out_channels": [32, 64], "attention_head_dim": None,
            ...     "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            ...     "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}).attention
            (False, True)
        """
        return _read(config)

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config.json of the same network in diffusers.

        Raises:
            UsageError: UNet2DModel has no words for it.

        Example:
            >>> UNetConfig(channels=(32, 64), attention=(False, True)).to_diffusers()["up_block_types"]
            ['AttnUpBlock2D', 'UpBlock2D']
        """
        return _write(self)


# diffusers' config.json ------------------------------------------------------------------------

RENAMED = {"block_out_channels": "channels", "layers_per_block": "layers", "cross_attention_dim": "context_dim"}

# Settings of the same name and meaning, with diffusers' defaults.
SHARED: dict[str, Any] = {
    "sample_size": None,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "layers_per_block": 2,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **SHARED,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attention_head_dim": 8,
        "attn_norm_num_groups": None,
        "add_attention": True,
        "num_train_timesteps": None,
    },
    "UNet2DConditionModel": {
        **SHARED,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "upcast_attention": False,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "time_cond_proj_dim": None,
    },
}
# Of those, what goes into our config under the same name.
CONDITIONAL = tuple(DEFAULTS["UNet2DConditionModel"])[-6:]

# Settings that are not supported, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type_num_heads": (64,),
    "num_attention_heads": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "class_embeddings_concat": (False,),
}

# What diffusers' EMA writes among a network's settings.
RECORDS = {"decay", "min_decay", "inv_gamma", "power", "use_ema_warmup", "update_after_step", "optimization_step"}


def _read(config: Mapping[str, Any]) -> UNetConfig:
    kind = config.get("_class_name", "UNet2DModel")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ModelFileError(f"the network is a {kind}; a U-Net is one of {', '.join(DEFAULTS)}")
    settings = known_settings(kind, config, DEFAULTS[kind], NEUTRAL)
    down, up = (_types(settings, key) for key in ("down_block_types", "up_block_types"))
    ours = _unconditional(settings, down, up) if kind == "UNet2DModel" else _conditional(settings, down)
    attention = tuple("Attn" in t for t in down)
    context_dim, resample = ours.get("context_dim"), (ours["downsample_type"], ours["upsample_type"])
    if (down_types(attention, context_dim, resample[0]), up_types(attention, context_dim, resample[1])) == (down, up):
        ours["attention"] = attention
    else:
        ours["down_block_types"], ours["up_block_types"] = down, up
    try:
        return UNetConfig(**ours)
    except ValidationError as error:
        raise ModelFileError(f"the config of this {kind} is not supported: {sentence(error, RENAMED)}") from None


def known_settings(
    kind: str, config: Mapping[str, Any], defaults: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Return every setting of one of diffusers' classes, having refused those that would be ignored.

    Arguments:
        kind: The class, for the message.
        config: What its config.json says.
        defaults: The settings that are read, with diffusers' defaults.
        neutral: Those that are not supported, with the values at which they change nothing.

    Raises:
        ModelFileError: There is an unknown setting, or one that is not supported.
    """
    for name, value in config.items():
        if name in defaults or name in RECORDS or name.startswith("_"):
            continue
        if name not in neutral:
            raise ModelFileError(f"the config of this {kind} has an unknown setting {name!r}{nearest(name, defaults)}")
        if value not in neutral[name]:
            raise ModelFileError(f"the config of this {kind} has {name} = {value!r}, which is not supported")
    return {name: config.get(name, default) for name, default in defaults.items()}


def _types(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of block types; their names once began with UNetRes."""
    types = settings[key]
    if not isinstance(types, list | tuple) or not all(isinstance(t, str) for t in types):
        raise ModelFileError(f"{key} is {types!r}; it must be a list of block types")
    return tuple(t.removeprefix("UNetRes") for t in types)


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    ours = {name: settings[name] for name in (*SHARED, "in_channels", "out_channels", "block_out_channels")}
    if ours["class_embed_type"] is not None:
        ours["num_class_embeds"] = None  # as diffusers, which then looks at the type alone
    if isinstance(ours["act_fn"], str):
        ours["act_fn"] = ours["act_fn"].lower()
    return {RENAMED.get(name, name): value for name, value in ours.items()}


def _unconditional(settings: Mapping[str, Any], down: Sequence[str], up: Sequence[str]) -> dict[str, Any]:
    """Return our settings of a UNet2DModel, except its block types."""
    ours = _shared(settings)
    if settings["mid_block_type"] not in ("UNetMidBlock2D", None):
        raise ModelFileError(f"mid_block_type is {settings['mid_block_type']!r}; it must be UNetMidBlock2D or null")
    if settings["add_attention"] not in (True, False):
        raise ModelFileError(f"add_attention is {settings['add_attention']!r}; it must be true or false")
    ours["middle"] = "attention" if settings["add_attention"] else "plain"
    if settings["mid_block_type"] is None:
        ours["middle"] = "none"
    if ours["middle"] == "attention":
        ours["attn_norm_num_groups"] = settings["attn_norm_num_groups"]
    if ours["middle"] == "attention" or any("Attn" in kind for kind in (*down, *up)):
        ours["head_dim"] = settings["attention_head_dim"]
    if ours["time_embedding_type"] == "learned":
        ours["num_train_timesteps"] = settings["num_train_timesteps"]
    # Only blocks that attend look at these two; the type of the others says how they resample.
    ours["downsample_type"] = "resnet" if "ResnetDownsampleBlock2D" in down else "conv"
    ours["upsample_type"] = "resnet" if "ResnetUpsampleBlock2D" in up else "conv"
    if "AttnDownBlock2D" in down:
        ours["downsample_type"] = settings["downsample_type"]
    if "AttnUpBlock2D" in up:
        ours["upsample_type"] = settings["upsample_type"]
    return ours


def _conditional(settings: Mapping[str, Any], down: Sequence[str]) -> dict[str, Any]:
    """Return our settings of a UNet2DConditionModel, except its block types."""
    ours = _shared(settings)
    if settings["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", None):
        raise ModelFileError(
            f"mid_block_type is {settings['mid_block_type']!r}; it must be UNetMidBlock2DCrossAttn or null"
        )
    ours["middle"] = "none" if settings["mid_block_type"] is None else "attention"
    for name in ("cross_attention_dim", "layers_per_block"):
        ours[RENAMED[name]] = _single(settings, name)
    ours["transformer_layers"] = settings["transformer_layers_per_block"]
    ours |= {name: settings[name] for name in CONDITIONAL}
    ours["upcast_attention"] = settings["upcast_attention"] or False  # SDXL's is null
    ours["downsample_type"] = ours["upsample_type"] = "conv"
    # What that class calls attention_head_dim is the number of heads.
    heads = settings["attention_head_dim"]
    if not isinstance(heads, list | tuple):
        return {**ours, "num_heads": heads}
    attending = [kind.startswith("Cross") for kind in down]
    attending[-1:] = [attending[-1] or ours["middle"] == "attention"] if down else []
    return ours | _heads(heads, settings["block_out_channels"], attending)


def _heads(heads: Sequence[Any], channels: Any, attending: Sequence[bool]) -> dict[str, int]:
    """Return the one number of heads or the one width of a head, from the number of heads at each level."""
    if not isinstance(channels, list | tuple) or not len(heads) == len(channels) == len(attending):
        raise ModelFileError(f"attention_head_dim is {list(heads)}; it must be a number, or one for each level")
    if not all(isinstance(n, int) and n > 0 for n in (*heads, *channels)):
        raise ModelFileError(f"attention_head_dim is {list(heads)}; it must hold whole numbers above 0")
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    ratios = {c / h for c, h, attends in zip(channels, heads, attending, strict=True) if attends}
    if len(ratios) != 1 or not next(iter(ratios)).is_integer():
        raise ModelFileError(f"attention_head_dim is {list(heads)}; heads of different widths are not supported")
    return {"head_dim": int(ratios.pop())}


def _single(settings: Mapping[str, Any], name: str) -> Any:
    value = settings[name]
    if not isinstance(value, list | tuple):
        return value
    if not value or any(v != value[0] for v in value):
        raise ModelFileError(f"{name} is {value!r}; levels that differ are not supported")
    return value[0]


def sentence(error: ValidationError, renamed: Mapping[str, str]) -> str:
    """Return every problem of a config in one line, each under diffusers' name for the setting."""
    theirs = {ours: name for name, ours in renamed.items()}
    problems = []
    for problem in error.errors():
        place = ".".join(theirs.get(str(part), str(part)) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {message}" if place else message)
    return "; ".join(problems)


def _write(config: UNetConfig) -> dict[str, Any]:
    kind = "UNet2DModel" if config.context_dim is None else "UNet2DConditionModel"
    for name, plain in (("positions", False), ("patch", 1)):
        if getattr(config, name) != plain:
            raise UsageError(f"{name}: {getattr(config, name)} is nothing that diffusers' {kind} can say")
    names = [name for name in DEFAULTS[kind] if RENAMED.get(name, name) in UNetConfig.model_fields]
    theirs = {"_class_name": kind} | {name: getattr(config, RENAMED.get(name, name)) for name in names}
    theirs |= {"down_block_types": config.down_types, "up_block_types": config.up_types}
    if kind == "UNet2DModel":
        if config.time_cond_proj_dim is not None:
            raise UsageError("time_cond_proj_dim without context_dim is nothing that diffusers' UNet2DModel can say")
        theirs["mid_block_type"] = None if config.middle == "none" else "UNetMidBlock2D"
        theirs["add_attention"] = config.middle == "attention"
        theirs["attention_head_dim"] = _head_dim(config)
    else:
        theirs["mid_block_type"] = None if config.middle == "none" else "UNetMidBlock2DCrossAttn"
        theirs["transformer_layers_per_block"] = config.transformer_layers
        heads = [max(1, config.heads(channels)[0]) for channels in config.channels]
        theirs["attention_head_dim"] = config.num_heads or heads
    return {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}


def _head_dim(config: UNetConfig) -> int | None:
    if config.num_heads is None:
        return config.head_dim
    widths = {channels // config.num_heads for channels in config.attended}
    if len(widths) > 1:
        raise UsageError(
            f"num_heads is {config.num_heads} on levels of different width, which diffusers' UNet2DModel cannot say; "
            "give head_dim instead"
        )
    return widths.pop()
