"""The folder that diffusers keeps a pipeline of a U-Net and a scheduler in.

    model_index.json                            which pipeline, of which parts
    unet/config.json                            the network
    unet/diffusion_pytorch_model.safetensors    its weights
    scheduler/scheduler_config.json             the schedule, and how to sample
    reverie.json                                our own card: classes, data, training, checksums
    README.md                                   the same for people

Folders that diffusers wrote itself are read without the last two, and so is a bare UNet2DModel. Nothing
in a folder is imported or run: the names of classes are compared with the few that are known.

References:
    Loading pipelines, and the layout of their folders
    https://huggingface.co/docs/diffusers/using-diffusers/other-formats
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.storage import Digest
from reverie.models.card import Card, NetworkSpec, SamplingDefaults, ScheduleSpec, parse_card
from reverie.models.checkpoints import first, safetensors_writer
from reverie.models.formats.base import (
    CARD,
    Contents,
    Format,
    build_unfilled,
    check_sealed,
    check_target,
    refuse_ema,
    seal,
    unseal,
    write_folder,
)
from reverie.models.formats.files import inside, read_json
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.scheduler import Reading, inexpressible, read_scheduler, write_scheduler
from reverie.models.formats.weights import install
from reverie.models.model import Model
from reverie.models.model_page import model_page
from reverie.networks.unet import modern_name
from reverie.networks.unet_config import UNetConfig

INDEX, UNET, SCHEDULER = "model_index.json", "unet", "scheduler"
CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
UNETS = ("UNet2DModel",)
WRITTEN_FOR = "0.38.0"  # of diffusers: the oldest whose layout this is known to be


class DiffusersFolder(Format):
    """diffusers' folder."""

    name = "diffusers"
    sign = f"a folder with {INDEX}, or with the {CONFIG} of a UNet2DModel"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and ((path / INDEX).exists() or (path / UNET / CONFIG).exists() or bare(path))

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        check_pipeline(path)
        unet = path if bare(path) else path / UNET
        card, warnings = sealed_card(path, unet) if (path / CARD).exists() else derive_card(path, unet)
        denoiser = build_unfilled(card, str(path))
        with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
            install(denoiser.network, weight_files(unet, Path(scratch)), str(unet), modern_name)
        return Model(denoiser, card, str(path), warnings=warnings)

    def describe(self, path: Path) -> dict[str, Any]:
        index = read_json(path / INDEX) if (path / INDEX).exists() else {}
        unet = path if bare(path) else path / UNET
        return {
            "pipeline": index.get("_class_name", "a bare UNet2DModel"),
            "files": [p.name for p in listed(unet)],
            "written by": "reverie" if (path / CARD).exists() else "diffusers, or another",
        }

    def inexpressible(self, model: Model) -> str | None:
        card = model.card
        if card.kind != "image" or card.network.name != "unet":
            return f"a {card.network.name} for {card.kind}"
        if card.codec is not None:
            return "a codec beside a UNet2DModel"
        try:
            network_config(card)
        except UsageError as error:
            return str(error)
        return inexpressible(card)

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        write_pipeline(self, model, path, overwrite, pipeline_index(), {})


def write_pipeline(
    own: Format, model: Model, path: Path, overwrite: bool, index: Mapping[str, Any], beside: Contents
) -> None:
    """Write a folder of a U-Net and a scheduler, with our card.

    Arguments:
        own: The format that it is of.
        model: The model.
        path: Where.
        overwrite: Replace a model of that format.
        index: Its model_index.json.
        beside: Further files, by their names in the folder.

    Raises:
        UsageError: There is something at the path already.
        StorageError: The disk is full, read-only, gone or faulty.
    """
    weights = f"{UNET}/{WEIGHTS}.safetensors"
    contents: Contents = {
        INDEX: text(index),
        f"{UNET}/{CONFIG}": text(network_config(model.card)),
        f"{SCHEDULER}/{SCHEDULER_CONFIG}": text(write_scheduler(model.card)),
        weights: safetensors_writer(model.denoiser.network.state_dict()),
        **beside,
    }

    def finish(written: Mapping[str, Digest]) -> Contents:
        page = model_page(model, own.name).encode()
        return {CARD: seal(model.card, {weights: written[weights]}), "README.md": page}

    check_target(path, own, overwrite, {**contents, "README.md": b""})
    write_folder(path, contents, finish)


def text(values: Mapping[str, Any]) -> bytes:
    """Return settings as diffusers lays them out."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def pipeline_index() -> dict[str, Any]:
    """Return model_index.json."""
    parts = {SCHEDULER: ["diffusers", "DDPMScheduler"], UNET: ["diffusers", "UNet2DModel"]}
    return {"_class_name": "DDPMPipeline", "_diffusers_version": WRITTEN_FOR, **parts}


def network_config(card: Card) -> dict[str, Any]:
    """Return the unet's config.json, with the size that diffusers' pipelines draw at."""
    _, height, width = card.shape
    config = UNetConfig(**card.network.config).to_diffusers()
    return config | {"sample_size": height if height == width else [height, width], "_diffusers_version": WRITTEN_FOR}


# Reading what is there ------------------------------------------------------------------------------


def bare(path: Path) -> bool:
    """Return whether a folder is a UNet2DModel without a pipeline around it."""
    config = path / CONFIG
    if (path / INDEX).exists() or not config.is_file():
        return False
    try:
        return read_json(config).get("_class_name") in UNETS
    except ModelFileError:
        return False


def check_pipeline(path: Path) -> None:
    """Refuse a pipeline of other parts than a U-Net and a scheduler, or of a class of its own.

    Raises:
        ModelFileError: It is one; the message names it.
    """
    if not (path / INDEX).exists():
        return
    index = read_json(path / INDEX)
    name, parts = index.get("_class_name"), {key: value for key, value in index.items() if not key.startswith("_")}
    if name not in PIPELINES or parts.keys() != {UNET, SCHEDULER}:
        held = ", ".join(str(part)[:40] for part in parts)
        raise ModelFileError(f"{path} is a {str(name)[:100]} of {held}; what is read is {' or '.join(PIPELINES)}")
    check_owners(path, {UNET, SCHEDULER})


def check_owners(path: Path, wanted: set[str]) -> None:
    """Refuse a pipeline of other parts than those wanted, or with one that is not diffusers' own.

    Raises:
        ModelFileError: It has such a part.
    """
    parts = {key: value for key, value in read_json(path / INDEX).items() if not key.startswith("_")}
    if parts.keys() != wanted:
        held, read = (", ".join(sorted(str(part)[:40] for part in some)) for some in (parts, wanted))
        raise ModelFileError(f"{path} is a pipeline of {held}; what is read has {read}")
    for part, place in parts.items():
        library = place[0] if isinstance(place, list) and place else place
        if library != "diffusers":
            raise ModelFileError(
                f"{path}: its {part} comes from {str(library)[:100]!r}, code that reverie does not run"
            )


def sealed_card(path: Path, unet: Path) -> tuple[Card, tuple[str, ...]]:
    """Return the card that reverie wrote, the network and the weights beside it being those of then."""
    sealed = unseal(path)
    check_network(unet, sealed.card)
    for name, digest in sealed.files.items():
        check_sealed(inside_unet(path, name), digest)
    return sealed.card, ()


def check_network(unet: Path, card: Card) -> None:
    """Refuse a config.json that describes another network than the card beside it.

    Raises:
        ModelFileError: It does.
    """
    ours, theirs = network_config(card), read_json(unet / CONFIG)
    if names := [name for name in ours if not name.startswith("_") and ours[name] != theirs.get(name)]:
        raise ModelFileError(
            f"{unet / CONFIG} describes another network than {CARD} does ({first(names)} differ); restore the one, or "
            f"delete {CARD} to go by the other"
        )


def inside_unet(folder: Path, name: str) -> Path:
    """Return the file that reverie.json names, which is one of the unet's."""
    head, _, tail = name.rpartition("/")
    if head != UNET:
        raise ModelFileError(
            f"{folder / CARD} names the file {name[:100]!r}, which is none of the unet's; nothing was read"
        )
    return inside(folder / UNET, tail)


def derive_card(path: Path, unet: Path) -> tuple[Card, tuple[str, ...]]:
    """Return the card of a folder that has none, from its configurations, and what was assumed."""
    config = read_json(unet / CONFIG)
    if config.get("_class_name", "UNet2DModel") not in UNETS:
        raise ModelFileError(f"{unet} is a {str(config['_class_name'])[:100]}; the network that is read is {UNETS[0]}")
    if "auto_map" in config:
        raise ModelFileError(
            f"{unet / CONFIG} wants code of the folder to be run (auto_map), which reverie does not do"
        )
    try:
        network = UNetConfig.from_diffusers(config)
    except ModelFileError as error:
        raise ModelFileError(f"{unet / CONFIG}: {error}") from None
    reading, assumed = find_scheduler(path)
    warnings = [f"{path}: {line}" for line in (*assumed, *reading.warnings)]
    if network.class_embed_type is not None:
        raise ModelFileError(
            f"{unet} is conditioned by {network.class_embed_type}, not by classes, which is not supported"
        )
    labels = network.num_class_embeds or 0
    if labels:
        warnings.append(f"{path} has {labels} classes without names, and none of them known to stand for no class")
    channels, learned = network.in_channels, reading.learned_variance
    if network.out_channels != (2 if learned else 1) * channels:
        raise ModelFileError(
            f"{unet} maps {channels} channels to {network.out_channels}, which does not go with "
            f"{'a' if learned else 'no'} learned variance (variance_type of the scheduler)"
        )
    card = {
        "shape": (channels, *sample_size(network, unet)),
        "network": NetworkSpec(config=network.model_dump(mode="json", exclude_unset=True)),
        "schedule": reading.schedule,
        "prediction": reading.prediction,
        "learned_variance": learned,
        "classes": tuple(str(label) for label in range(labels)),
        "unconditional": not labels,
        "sampling": reading.sampling,
    }
    return parse_card(card, str(path)), tuple(warnings)


def find_scheduler(path: Path) -> tuple[Reading, list[str]]:
    """Return what the scheduler's configuration says, and what was assumed where there is none."""
    for place in (path / SCHEDULER / SCHEDULER_CONFIG, path / SCHEDULER_CONFIG):
        if place.exists():
            try:
                return read_scheduler(read_json(place)), []
            except ModelFileError as error:
                raise ModelFileError(f"{place}: {error}") from None
    assumed = Reading(ScheduleSpec(), "eps", False, SamplingDefaults(), ())
    return assumed, ["no scheduler is beside the network; DDPM's linear schedule of 1000 timesteps and eps are assumed"]


def sample_size(network: UNetConfig, unet: Path) -> tuple[int, int]:
    """Return the height and width that a network was trained at."""
    size = network.sample_size
    if size is None:
        raise ModelFileError(f"{unet / CONFIG} says no sample_size, the height and width of its images; add it")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def listed(unet: Path, stem: str = WEIGHTS) -> list[Path]:
    """Return the files in a part's folder that hold weights, or say where they are."""
    return sorted(p for p in unet.glob(f"{stem}*") if p.suffix in (".safetensors", ".json", ".bin"))


def weight_files(unet: Path, scratch: Path, stem: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files that hold the weights: the full ones, a variant's (fp16), or shards.

    Arguments:
        unet: The folder.
        scratch: Where PyTorch's pickle, if there is nothing else, may be turned into one.
        stem: How the files' names begin.

    Raises:
        ModelFileError: There are none, or it is not clear which, or they lie outside the folder.
    """
    there = [p.name for p in listed(unet, stem)]
    whole = [name for name in there if name.endswith(".safetensors") and "-of-" not in name]
    indices = [name for name in there if name.endswith(".json") and ".safetensors.index" in name]
    for names in (whole, indices):
        plain = [name for name in names if name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json")]
        if chosen := plain or names:
            if len(chosen) > 1:
                raise ModelFileError(f"{unet} has the variants {', '.join(chosen)}; keep one of them in the folder")
            path = inside(unet, chosen[0])
            return [path] if names is whole else shards(unet, path)
    pickled = f"{stem}.bin" if stem == WEIGHTS else f"pytorch_{stem}.bin"  # of transformers' parts
    if (unet / pickled).is_file():
        return [as_safetensors(inside(unet, pickled), scratch / f"{unet.name}.safetensors")]
    raise ModelFileError(f"{unet} has no {stem}.safetensors; what is there: {first(there) or 'no weights at all'}")


def shards(unet: Path, index: Path) -> list[Path]:
    """Return the files that an index of shards names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelFileError(f"{index} names no shards (weight_map); download it again")
    found = [inside(unet, name) for name in sorted(set(places.values()))]
    if missing := [path.name for path in found if not path.exists()]:
        raise ModelFileError(f"{unet} lacks {len(missing)} of {len(found)} shards: {first(missing)}; download them")
    return found
