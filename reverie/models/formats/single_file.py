"""One .safetensors file: the weights, with the card in its header's metadata."""

from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.storage import write_file
from reverie.models.card import Card, ClipSpec, parse_card
from reverie.models.checkpoints import safetensors_writer
from reverie.models.formats.base import Format, build_unfilled, refuse_ema
from reverie.models.formats.files import what_is
from reverie.models.formats.weights import Header, install, read_header
from reverie.models.model import Model

KEY = "reverie"

# What the names of a file's tensors begin with, and what it then is.
LAYOUTS = (
    ("model.diffusion_model.", "a checkpoint of latent diffusion (Stable Diffusion's single file)"),
    ("first_stage_model.", "a checkpoint of latent diffusion's autoencoder"),
    ("lora_unet_", "a LoRA, which changes another model"),
    ("lora_te", "a LoRA, which changes another model"),
    ("diffusion_model.", "a LoRA or a network in ComfyUI's names"),
    ("unet.", "a LoRA or a network in PEFT's names"),
    ("encoder.", "an autoencoder"),
    ("text_model.", "a text encoder"),
    ("double_blocks.", "a transformer (Flux)"),
    ("transformer_blocks.", "a transformer"),
)
UNET_KEYS = {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"}


class SingleFile(Format):
    """One .safetensors file."""

    name = "single-file"
    sign = "a .safetensors file with a card in its header"

    def recognises(self, path: Path) -> bool:
        # Whatever else a file is, a picture or a pickle, `read` says so.
        return path.is_file()

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        card = card_of(path, read_header(path))
        if card.codec is not None:
            raise ModelFileError(
                f"{path} is a model of latents without what decodes them; use the folder that it is of"
            )
        denoiser = build_unfilled(card, str(path))
        install(denoiser.network, [path], str(path))
        return Model(denoiser, card, str(path))

    def describe(self, path: Path) -> dict[str, Any]:
        header = read_header(path)
        count = sum(1 for _ in header.specs)
        return {"tensors": count, "layout": layout(header), "metadata": sorted(header.metadata)}

    def inexpressible(self, model: Model) -> str | None:
        if isinstance(model.card.text, ClipSpec):
            return "the text encoders of CLIP"
        return None if model.card.codec is None else "a codec"

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        if path.exists() and not (overwrite and path.is_file() and what_is(path) is None):
            raise UsageError(f"{path} exists already; choose another name, or ask to overwrite it")
        metadata = {KEY: model.card.model_dump_json()}
        state = model.denoiser.network.state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, safetensors_writer(state, metadata), sum(tensor.nbytes for tensor in state.values()))


def card_of(path: Path, header: Header) -> Card:
    """Return the card in a file's header.

    Raises:
        ModelFileError: There is none; the message says what the file looks like.
    """
    if KEY in header.metadata:
        return parse_card(header.metadata[KEY], f"{path}, in its header,")
    raise ModelFileError(
        f"{path} has no card in its header and cannot be sampled alone; it looks like {layout(header)}"
    )


def layout(header: Header) -> str:
    """Return what a file looks like, by the names of its tensors."""
    names = header.specs
    if KEY in header.metadata:
        return "a model of reverie"
    if names.keys() >= UNET_KEYS:
        return "the weights of a UNet2DModel: put it in a folder with its config.json, as diffusers does"
    for start, kind in LAYOUTS:
        if any(name.startswith(start) for name in names):
            return kind
    some = ", ".join(list(names)[:3]) or "none"
    return f"nothing known ({len(names)} tensors: {some}, ...)"
