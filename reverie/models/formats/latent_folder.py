"""The folder that diffusers keeps latent diffusion without words in (LDMPipeline).

    model_index.json                       which pipeline, of which parts
    unet/, scheduler/                      as in the folder without latents
    vqvae/                                 config.json and diffusion_pytorch_model.safetensors of an autoencoder
    reverie.json, README.md                our own card, and the same for people; not in folders of diffusers' own

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3
    https://arxiv.org/abs/2112.10752
"""

import tempfile
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.card import Card
from reverie.models.codec import Codec
from reverie.models.formats.base import (
    CARD,
    Format,
    build_unfilled,
    refuse_ema,
)
from reverie.models.formats.codec_file import spec_of, vae_contents, vae_folder
from reverie.models.formats.diffusers_folder import (
    INDEX,
    SCHEDULER,
    UNET,
    WRITTEN_FOR,
    check_owners,
    derive_card,
    network_config,
    sealed_card,
    weight_files,
    write_pipeline,
)
from reverie.models.formats.files import read_json
from reverie.models.formats.pipeline import CODECS, codec_spec
from reverie.models.formats.scheduler import inexpressible
from reverie.models.formats.weights import install
from reverie.models.model import Model
from reverie.networks.unet import modern_name

PIPELINE, CODER = "LDMPipeline", "vqvae"


class LatentFolder(Format):
    """diffusers' folder of latent diffusion without words."""

    name = "latent-diffusion"
    sign = f"a folder whose {INDEX} names an {PIPELINE}"

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or not (path / INDEX).is_file():
            return False
        try:
            return read_json(path / INDEX).get("_class_name") == PIPELINE
        except ModelFileError:
            return False

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        check_owners(path, {UNET, SCHEDULER, CODER})
        codec = vae_folder(path / CODER)
        card, warnings = self.card(path, codec)
        denoiser = build_unfilled(card, str(path))
        with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
            install(denoiser.network, weight_files(path / UNET, Path(scratch)), str(path / UNET), modern_name)
        return Model(denoiser, card, str(path), warnings=warnings, codec=codec)

    def card(self, path: Path, codec: Codec) -> tuple[Card, tuple[str, ...]]:
        """Return the card beside the weights, or what their configurations make of one."""
        if not (path / CARD).exists():
            card, warnings = derive_card(path, path / UNET)
            spec = codec_spec(read_json(path / CODER / "config.json"), str(path))
            return card.model_copy(update={"codec": spec}), warnings
        card, warnings = sealed_card(path, path / UNET)
        told, found = card.codec, spec_of(codec)
        if told is None or (told.digest, told.scale) != (told.digest and found.digest, found.scale):
            raise ModelFileError(f"{path / CODER} is another codec than {CARD} tells of; restore it from a copy")
        return card, warnings

    def describe(self, path: Path) -> dict[str, Any]:
        coder = read_json(path / CODER / "config.json").get("_class_name") if (path / CODER).is_dir() else None
        return {"pipeline": PIPELINE, "codec": coder}

    def inexpressible(self, model: Model) -> str | None:
        card = model.card
        if card.kind != "image" or card.network.name != "unet" or card.text is not None:
            return f"a {card.network.name} for {card.kind if card.text is None else 'prompts'} in latents"
        if card.codec is None or model.codec is None:
            return "a model without a codec"
        if card.codec.shift:
            return "a shift of the latents"
        try:
            network_config(card)
            model.codec.network.config.to_diffusers()  # type: ignore[union-attr, operator]
        except UsageError as error:
            return str(error)
        return inexpressible(card)

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        assert model.codec is not None
        beside = {f"{CODER}/{name}": content for name, content in vae_contents(model.codec).items()}
        write_pipeline(self, model, path, overwrite, pipeline_index(model), beside)


def pipeline_index(model: Model) -> dict[str, Any]:
    """Return model_index.json."""
    assert model.card.codec is not None
    coder = next(theirs for theirs, (ours, _) in CODECS.items() if ours == model.card.codec.name)
    parts = {"scheduler": "DDPMScheduler", "unet": "UNet2DModel", CODER: coder}
    named = {part: ["diffusers", kind] for part, kind in parts.items()}
    return {"_class_name": PIPELINE, "_diffusers_version": WRITTEN_FOR, **named}
