"""From one layout of a model to another.

Between diffusers' folder of Stable Diffusion and the original single file the tensors themselves are carried over,
in the type that they have: what went there and back is what it was, every tensor of it. What one layout has no
place for goes along beside it, and back when the way is gone back. Any other conversion reads the model and writes it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.storage import write_file
from reverie.models.card import ScheduleSpec
from reverie.models.checkpoints import safetensors_writer
from reverie.models.clip_tokens import find_vocabulary, read_tokenizer
from reverie.models.formats import read_model, recognise, write_model
from reverie.models.formats.base import Contents, write_folder
from reverie.models.formats.diffusers_folder import INDEX, SCHEDULER, SCHEDULER_CONFIG, text
from reverie.models.formats.files import read_json
from reverie.models.formats.latent_diffusion import Family, Layout, from_original, layout_of, to_original
from reverie.models.formats.original import PADS, pickled
from reverie.models.formats.original import layout_of as file_layout
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.pipeline import TEXTS, UNET, VAE
from reverie.models.formats.scheduler import write_schedule
from reverie.models.formats.stable_diffusion import STEMS, folder_tensors
from reverie.models.formats.weights import read_header, read_tensors

CARRIED = "reverie-carried.safetensors"  # of an original file, what diffusers' folder has no place for
KEPT = "reverie.folder"  # in an original file's header: the settings of the folder that it came from
SETTINGS = (INDEX, f"{SCHEDULER}/{SCHEDULER_CONFIG}")
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Arguments:
        target: Where.
        kind: The layout's name.
        tensors: How many tensors, by part.
        carried: Tensors that the layout has no place for, and that go along beside it.
        notes: What a user should know.
    """

    target: Path
    kind: str
    tensors: dict[str, int]
    carried: int = 0
    notes: tuple[str, ...] = ()


def convert(source: Path | str, target: Path | str, to: str, overwrite: bool = False) -> Conversion:
    """Write a model in another layout.

    Arguments:
        source: A model of any layout.
        target: Where: a folder, or a file.
        to: diffusers, original, native or single-file.
        overwrite: Replace a model that is there.

    Raises:
        UsageError: There is something there already, or the layout has no words for the model.
        ModelFileError: The source is no model, or is damaged.
        StorageError: The disk is full, read-only, gone or faulty.
    """
    source, target = Path(source), Path(target)
    known = recognise(source)
    if to == "original" and known.name == "stable-diffusion":
        return folder_to_file(source, target, overwrite)
    if to == "diffusers" and known.name == "original":
        return file_to_folder(source, target, overwrite)
    if to == "original" or known.name in ("original", "stable-diffusion"):
        possible = "diffusers" if known.name == "original" else "original"
        hint = f"; it can be written as {possible}" if known.name in ("original", "stable-diffusion") else ""
        raise UsageError(f"{source} is a model of the layout {known.name}, which cannot be written as {to}{hint}")
    model = read_model(source)
    path = write_model(model, target, to, overwrite)
    count = len(model.denoiser.network.state_dict())
    return Conversion(path, to, {"network": count}, notes=tuple(model.warnings))


# From the folder to one file ------------------------------------------------------------------------


def folder_to_file(source: Path, target: Path, overwrite: bool) -> Conversion:
    """Write a folder of diffusers' as one file of the original layout."""
    if target.exists() and not (overwrite and target.is_file()):
        raise UsageError(f"{target} exists already; choose another name, or ask to overwrite it")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target} is to be one file; end its name with .safetensors")
    names = [name for name in (UNET, VAE, *TEXTS) if (source / name / "config.json").is_file()]
    held = {name: folder_tensors(source / name, STEMS[name]) for name in names}
    layout = layout_of(family(source), shapes(named(held)), predicts_v(source))
    carried, metadata = carried_along(source)
    tensors = to_original(layout, named(held), carried)
    words = {"modelspec.prediction_type": "v" if predicts_v(source) else "epsilon"}
    kept = {KEPT: json.dumps({name: read_json(source / name) for name in SETTINGS if (source / name).is_file()})}
    writer = safetensors_writer(tensors, {**words, **kept, **metadata})
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, writer, sum(tensor.nbytes for tensor in tensors.values()))
    return Conversion(target, "original", {name: len(part) for name, part in held.items()}, len(carried))


def family(folder: Path) -> Family:
    """Return which Stable Diffusion a folder holds, by its U-Net's configuration."""
    config = read_json(folder / UNET / "config.json")
    if config.get("addition_embed_type") == "text_time":
        return "sdxl" if (folder / TEXTS[0] / "config.json").is_file() else "sdxl-refiner"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def predicts_v(folder: Path) -> bool:
    """Return whether a folder's scheduler says that v is predicted."""
    path = folder / SCHEDULER / SCHEDULER_CONFIG
    return path.is_file() and read_json(path).get("prediction_type") == "v_prediction"


def named(held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return parts with the names that text encoders have on the hub: `text_model.` before all but the projection."""
    found = {part: dict(tensors) for part, tensors in held.items()}
    for part in TEXTS:
        if part in found:
            found[part] = {
                name if name.startswith("text_") else f"text_model.{name}": tensor
                for name, tensor in found[part].items()
                if not name.endswith("position_ids")
            }
    return found


def shapes(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of parts."""
    return {part: {name: tuple(t.shape) for name, t in tensors.items()} for part, tensors in parts.items()}


def carried_along(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a folder has beside it from the file that it once was: tensors, and the words of its header."""
    path = folder / CARRIED
    if not path.is_file():
        return {}, {}
    header = read_header(path)
    words = {name: value for name, value in header.metadata.items() if name not in ("format", KEPT)}
    return read_tensors(path, header.specs), words


# From one file to the folder ------------------------------------------------------------------------


def file_to_folder(source: Path, target: Path, overwrite: bool) -> Conversion:
    """Write one file of the original layout as a folder of diffusers'."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not (overwrite and (target / INDEX).is_file()):
            raise UsageError(f"{target} is not empty; choose another folder, or ask to overwrite the model in it")
        shutil.rmtree(target)
    with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
        file = as_safetensors(source, Path(scratch) / "weights.safetensors") if pickled(source) else source
        header = read_header(file)
        layout = file_layout(header, source)
        every = read_tensors(file, header.specs)
        parts = from_original(layout, every.__getitem__)
        settings = json.loads(header.metadata.get(KEPT, "{}"))
        contents: dict[str, Any] = {}
        for part, tensors in parts.items():
            config = dict(layout.configs[part])
            if part in CLASSES:
                config["_class_name"] = CLASSES[part]
            contents[f"{part}/config.json"] = text(config)
            contents[f"{part}/{STEMS[part]}.safetensors"] = safetensors_writer(whole(tensors))
        contents |= vocabularies(layout)
        contents[INDEX] = text(settings.get(INDEX) or index_of(layout))
        place = f"{SCHEDULER}/{SCHEDULER_CONFIG}"
        contents[place] = text(settings.get(place) or scheduler_of(layout))
        words = {name: value for name, value in header.metadata.items() if name not in ("format", KEPT)}
        left = {name: every[name].contiguous() for name in layout.left}
        if left or words:
            contents[CARRIED] = safetensors_writer(left, words)
        write_folder(target, contents, lambda written: nothing())
        counts = {part: len(tensors) for part, tensors in parts.items()}
        return Conversion(target, "diffusers", counts, len(left), layout.warnings)


def nothing() -> Contents:
    """Return no further files."""
    return {}


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that each have their numbers in a row."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def vocabularies(layout: Layout) -> dict[str, bytes]:
    """Return the files of the tokenizers' folders.

    Raises:
        UsageError: There is no vocabulary of CLIP's here to put into them.
    """
    contents = {}
    for part in TEXTS:
        if part not in layout.configs:
            continue
        pad = PADS.get((layout.family, part))
        tokenizer = read_tokenizer(find_vocabulary(), pad)
        folder = part.replace("text_encoder", "tokenizer")
        merges = "\n".join(" ".join(two) for two in tokenizer._merges)
        words = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        pads = {"pad_token": pad or "<|endoftext|>"}
        contents[f"{folder}/vocab.json"] = json.dumps(tokenizer.get_vocab(), ensure_ascii=False).encode()
        contents[f"{folder}/merges.txt"] = f"#version: 0.2\n{merges}\n".encode()
        contents[f"{folder}/special_tokens_map.json"] = text({**words, **pads})
        contents[f"{folder}/tokenizer_config.json"] = text(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **words, **pads}
        )
    return contents


def index_of(layout: Layout) -> dict[str, Any]:
    """Return model_index.json of a layout."""
    large = layout.family in ("sdxl", "sdxl-refiner")
    task = "Inpaint" if layout.task == "inpainting" else ""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if large else ''}{task}Pipeline",
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{part: ["diffusers", name] for part, name in CLASSES.items()},
    }
    for part in TEXTS:
        if part in layout.configs:
            kind = "CLIPTextModelWithProjection" if part == TEXTS[1] else "CLIPTextModel"
            index |= {
                part: ["transformers", kind],
                part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"],
            }
    if large:
        return index | {"force_zeros_for_empty_prompt": True}
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def scheduler_of(layout: Layout) -> dict[str, Any]:
    """Return scheduler_config.json of a layout: the schedule that all Stable Diffusions were trained on."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.38.0",
        **write_schedule(ScheduleSpec(name="scaled-linear")),
        "rescale_betas_zero_snr": layout.zero_snr,
        "prediction_type": "v_prediction" if layout.prediction == "v" else "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if layout.zero_snr else "leading",
    }
