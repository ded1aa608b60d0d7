"""A Stable Diffusion model from its parts, wherever they were found: a folder of diffusers', or one original file."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reverie.base.errors import ModelFileError
from reverie.models.card import Card, ClipSpec, CodecSpec, NetworkSpec, SamplingDefaults, parse_card
from reverie.models.clip_conditioner import ClipConditioner
from reverie.models.clip_tokens import Tokens, clip_part
from reverie.models.codec import build_codec
from reverie.models.formats.base import build_unfilled
from reverie.models.formats.scheduler import Reading
from reverie.models.formats.weights import fill
from reverie.models.model import Model
from reverie.networks import networks
from reverie.networks.unet import modern_name
from reverie.networks.unet_config import UNetConfig

UNET, VAE, TEXTS = "unet", "vae", ("text_encoder", "text_encoder_2")
MAX_WIDTH, MAX_LAYERS, MAX_WORDS = 16384, 128, 1_000_000
KL = "AutoencoderKL"
CODECS = {  # diffusers' classes: our networks, and the scale of the latents where none is told
    KL: ("autoencoder", 0.18215),
    "VQModel": ("vq-autoencoder", 0.18215),
    "AutoencoderTiny": ("tiny-autoencoder", 1.0),
}
GUIDANCE = {"sd": 7.5, "sdxl": 5.0}  # what diffusers' pipelines take where nobody says otherwise
POSITIONS = re.compile(r"(.*\.)?position_ids")

Read = Callable[[str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Parts:
    """What a Stable Diffusion model is put together from.

    Arguments:
        where: What to call it in a message.
        configs: The config.json of each part: "unet", "vae", "text_encoder", of SDXL "text_encoder_2".
        tensors: Returns a part's tensors by their names on the disk.
        reading: The schedule, and how to sample.
        tokenizers: transformers' tokenizer of each text encoder.
        zero_empty: Whether guidance leads away from zeros where there is no negative prompt.
        warnings: What went otherwise than hoped for.
    """

    where: str
    configs: Mapping[str, Mapping[str, Any]]
    tensors: Read
    reading: Reading
    tokenizers: Mapping[str, Any]
    zero_empty: bool = False
    warnings: Sequence[str] = field(default=())


def assemble(parts: Parts) -> Model:
    """Return the model.

    Raises:
        ModelFileError: A part is missing, or of another model.
        UsageError: transformers is not installed.
    """
    card = make_card(parts)
    denoiser = build_unfilled(card, parts.where)
    fill(denoiser.network, renamed(parts.tensors(UNET)), f"{parts.where}: {UNET}")
    assert card.codec is not None
    assert isinstance(card.text, ClipSpec)
    with torch.device("meta"):
        codec = build_codec(card.codec)
    fill(codec.network, renamed(parts.tensors(VAE)), f"{parts.where}: {VAE}")
    tokens = [
        Tokens(parts.tokenizers[name], int(parts.configs[name].get("max_position_embeddings", 77)))
        for name in texts_of(parts)
    ]
    conditioner = ClipConditioner(card.text, text_encoders(parts), tokens, read=lambda: text_encoders(parts))
    return Model(
        denoiser, card, parts.where, warnings=tuple(parts.warnings), conditioner=conditioner, codec=codec.freeze()
    )


def texts_of(parts: Parts) -> list[str]:
    """Return the names of the text encoders that there are."""
    found = [name for name in TEXTS if name in parts.configs]
    if not found:
        raise ModelFileError(f"{parts.where} has no text encoder: it is a part of a model; use the whole")
    return found


def make_card(parts: Parts) -> Card:
    """Return the card of a Stable Diffusion model."""
    try:
        network = UNetConfig.from_diffusers(parts.configs[UNET])
    except ModelFileError as error:
        raise ModelFileError(f"{parts.where}: {UNET}: {error}") from None
    if VAE not in parts.configs:
        raise ModelFileError(f"{parts.where} has no autoencoder ({VAE}); use the whole model")
    codec = codec_spec(parts.configs[VAE], parts.where)
    size = network.sample_size or 64
    sides = (size, size) if isinstance(size, int) else size
    family = "sdxl" if network.addition_embed_type == "text_time" else "sd"
    text = {
        "kind": "clip",
        "family": family,
        "encoders": [dict(parts.configs[name]) for name in texts_of(parts)],
        "zero_empty": parts.zero_empty,
    }
    reading = parts.reading
    sampling = reading.sampling.model_copy(update={"guidance": GUIDANCE[family], "clip": False})
    values = {
        "shape": (network.out_channels, *sides),
        "network": NetworkSpec(config=network.model_dump(mode="json", exclude_unset=True)),
        "schedule": reading.schedule,
        "prediction": reading.prediction,
        "text": text,
        "codec": codec,
        "sampling": SamplingDefaults(**sampling.model_dump()),
    }
    return parse_card(values, parts.where)


def codec_spec(config: Mapping[str, Any], where: str) -> CodecSpec:
    """Return the codec that the config.json of one of diffusers' autoencoders stands for.

    Raises:
        ModelFileError: It is none that is known, or asks for what is not supported.
    """
    name, usual = CODECS.get(str(config.get("_class_name", KL)), CODECS[KL])
    try:
        network = networks[name].Config.from_diffusers(config)  # which refuses an unknown class by its name
    except ModelFileError as error:
        raise ModelFileError(f"{where}: {VAE}: {error}") from None
    scale, shift = (config.get(f"{name}_factor") for name in ("scaling", "shift"))
    return CodecSpec(
        name=name,
        config=network.model_dump(mode="json", exclude_unset=True),
        scale=usual if scale is None else float(scale),
        shift=0.0 if shift is None else float(shift),
    )


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's tensors with the names of older versions of diffusers brought up to date."""
    return {modern_name(name): squared(name, tensor) for name, tensor in tensors.items()}


def squared(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as it is, but an autoencoder's attention of 1x1 convolutions as the matrices that they are."""
    convolution = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and ".mid_block.attentions." in f".{name}"
    return tensor[..., 0, 0] if convolution and "encoder." in f".{name}" else tensor


# Text encoders --------------------------------------------------------------------------------------


def text_encoders(parts: Parts) -> list[nn.Module]:
    """Return the text encoders with their weights.

    Raises:
        ModelFileError: They are not sound.
    """
    encoders = []
    for name in texts_of(parts):
        # Where the text ends, as the tokenizer says: configurations of old say 2, of which nothing is meant.
        config = {**parts.configs[name], "eos_token_id": int(parts.tokenizers[name].eos_token_id)}
        encoder = text_encoder(config, parts.where, pooled=name == TEXTS[1])
        fill_text(encoder, parts.tensors(name), f"{parts.where}: {name}")
        encoders.append(encoder)
    return encoders


def text_encoder(config: Mapping[str, Any], where: str, pooled: bool) -> nn.Module:
    """Return transformers' encoder of a configuration, on the device "meta".

    Raises:
        ModelFileError: The configuration is none, or is out of all bounds.
    """
    limits = {
        "hidden_size": MAX_WIDTH,
        "intermediate_size": 4 * MAX_WIDTH,
        "num_hidden_layers": MAX_LAYERS,
        "num_attention_heads": 1024,
        "vocab_size": MAX_WORDS,
        "max_position_embeddings": 4096,
        "projection_dim": MAX_WIDTH,
    }
    for name, most in limits.items():
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ModelFileError(f"{where}: the text encoder's {name} is {str(value)[:40]}; it must be in 1..{most}")
    known = {name: config[name] for name in (*limits, *TOLD) if name in config}
    if config.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        raise ModelFileError(f"{where}: the text encoder's hidden_act is {str(config['hidden_act'])[:40]!r}")
    kind = "CLIPTextModelWithProjection" if pooled else "CLIPTextModel"
    try:
        with torch.device("meta"):
            return clip_part(kind)(clip_part("CLIPTextConfig")(**known))
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{where}: the text encoder's configuration is not sound: {str(error)[:100]}") from None


TOLD = ("hidden_act", "layer_norm_eps", "eos_token_id", "bos_token_id", "pad_token_id")


def fill_text(encoder: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a text encoder its weights, whichever of the two names they have: with `text_model.` or without."""
    wanted = encoder.state_dict()
    bare = not any(name.startswith("text_model.") for name in wanted)
    found = {}
    for name, tensor in tensors.items():
        if POSITIONS.fullmatch(name):  # counted from 0, whatever a file says
            continue
        plain = name.removeprefix("text_model.")
        found[plain if bare or plain in wanted else f"text_model.{plain}"] = tensor
    fill(encoder, found, where)
    for module in encoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids"
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
