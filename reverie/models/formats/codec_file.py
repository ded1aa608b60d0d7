"""A codec's weights: beside a model's own as codec.safetensors, in a vae folder of diffusers', or in two of taesd's.

What the codec is stands in the card; its scale and shift too.
"""

from pathlib import Path

import torch

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.card import Card, CodecSpec
from reverie.models.checkpoints import safetensors_writer
from reverie.models.codec import Codec, build_codec
from reverie.models.formats.base import Contents, write_folder
from reverie.models.formats.diffusers_folder import text
from reverie.models.formats.files import read_json
from reverie.models.formats.pipeline import CODECS, VAE, codec_spec, renamed
from reverie.models.formats.stable_diffusion import STEMS, folder_tensors
from reverie.models.formats.taesd import read_taesd
from reverie.models.formats.weights import fill, install
from reverie.models.model import Model, weights_digest
from reverie.networks import networks

CODEC = "codec.safetensors"


def codec_contents(codec: Codec | None) -> Contents:
    """Return the file that a model's folder has for its codec: none without one."""
    return {} if codec is None else {CODEC: safetensors_writer(codec.network.state_dict())}


def beside(path: Path, card: Card) -> Codec | None:
    """Return the codec of a model whose folder this is; None where its card has none.

    Raises:
        ModelFileError: Its weights are missing, damaged or another's.
    """
    if card.codec is None:
        return None
    file = path / CODEC
    if not file.is_file():
        raise ModelFileError(f"{path} is a model of latents without what decodes them: {file} is missing; put it back")
    with torch.device("meta"):
        codec = build_codec(card.codec)
    install(codec.network, [file], str(file))
    if card.codec.digest and weights_digest(codec.network.state_dict()) != card.codec.digest:
        raise ModelFileError(f"{file} is another codec than the model was trained with; restore it from a copy")
    return codec.freeze()


def spec_of(codec: Codec) -> CodecSpec:
    """Return what a card says of a codec, its digest too."""
    name = next(name for name, _ in CODECS.values() if isinstance(codec.network, networks[name]))
    config = codec.network.config.model_dump(mode="json", exclude_unset=True)  # type: ignore[union-attr, operator]
    digest = weights_digest(codec.network.state_dict())
    return CodecSpec(name=name, config=config, scale=codec.scale, shift=codec.shift, digest=digest)


def vae_folder(path: Path) -> Codec:
    """Return the codec of a folder of diffusers' with an AutoencoderKL, an AutoencoderTiny or a VQModel.

    Raises:
        ModelFileError: It is none, or is damaged.
    """
    with torch.device("meta"):
        codec = build_codec(codec_spec(read_json(path / "config.json"), str(path)))
    fill(codec.network, renamed(folder_tensors(path, STEMS[VAE])), str(path))
    return codec.freeze()


def read_codec(path: str) -> Codec:
    """Return the codec at a path.

    Arguments:
        path: A run or a model of latents; a folder of diffusers' with a vae, or the vae's own; or the two files of a
            tiny autoencoder in its original layout, encoder:decoder.

    Raises:
        UsageError: There is nothing at the path, or no codec.
        ModelFileError: It is damaged, foreign or hostile.
    """
    from reverie.models.formats import read_model  # which imports the formats, which import this

    folder = Path(path)
    if not folder.exists():
        encoder, colon, decoder = path.rpartition(":")
        if colon and Path(encoder).is_file() and Path(decoder).is_file():
            return Codec(read_taesd(encoder, decoder)).freeze()
        raise UsageError(f"there is no codec {path}; give a folder with a vae, or two files as encoder:decoder")
    for place in (folder / VAE, folder):
        config = place / "config.json"
        if config.is_file() and read_json(config).get("_class_name") in CODECS:
            return vae_folder(place)
    found: Model = read_model(folder)
    if found.codec is None:
        raise UsageError(f"{path} is a model of pictures, and has no codec")
    return found.codec


def write_vae(codec: Codec, path: Path) -> None:
    """Write an autoencoder as a vae's folder of diffusers'; what is there is replaced.

    Arguments:
        codec: The autoencoder.
        path: The folder.

    Raises:
        StorageError: It can't be written.
    """
    write_folder(path, vae_contents(codec), lambda _: {})


def vae_contents(codec: Codec) -> Contents:
    """Return the two files of a vae's folder of diffusers'."""
    settings = codec.network.config.to_diffusers() | {"scaling_factor": codec.scale}  # type: ignore[union-attr, operator]
    if codec.shift:
        settings["shift_factor"] = codec.shift
    weights = safetensors_writer(codec.network.state_dict(), {"format": "pt"})
    return {"config.json": text(settings), f"{STEMS[VAE]}.safetensors": weights}
