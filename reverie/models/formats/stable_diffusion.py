"""The folder that diffusers keeps Stable Diffusion in.

    model_index.json                                     which pipeline, of which parts
    unet/, vae/                                          config.json and diffusion_pytorch_model.safetensors
    text_encoder/, text_encoder_2/                       config.json and model.safetensors
    tokenizer/, tokenizer_2/                             vocab.json and merges.txt
    scheduler/scheduler_config.json                      the schedule, and how to sample

Nothing in it is imported or run: the names of classes are compared with the few that are known.

References:
    Loading pipelines, and the layout of their folders
    https://huggingface.co/docs/diffusers/using-diffusers/other-formats
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.base.errors import ModelFileError
from reverie.models.clip_tokens import read_tokenizer
from reverie.models.formats.base import Format, refuse_ema
from reverie.models.formats.diffusers_folder import INDEX, WEIGHTS, find_scheduler, weight_files
from reverie.models.formats.files import inside, read_json
from reverie.models.formats.pipeline import TEXTS, UNET, VAE, Parts, assemble
from reverie.models.formats.weights import read_header, read_tensors
from reverie.models.model import Model

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
STEMS = {UNET: WEIGHTS, VAE: WEIGHTS, **dict.fromkeys(TEXTS, "model")}

PAIR = ("text_encoder", "tokenizer")  # the one's folder and the other's
PASSED_OVER = ("safety_checker", "feature_extractor", "image_encoder")
OWNERS = ("diffusers", "transformers", "stable_diffusion")  # the last: the safety checker's, of old


class StableDiffusionFolder(Format):
    """diffusers' folder of Stable Diffusion 1, 2 and XL."""

    name = "stable-diffusion"
    sign = f"a folder whose {INDEX} names a StableDiffusionPipeline"

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or not (path / INDEX).is_file():
            return False
        try:
            return read_json(path / INDEX).get("_class_name") in PIPELINES
        except ModelFileError:
            return False

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        index = read_json(path / INDEX)
        warnings = check_parts(path, index)
        reading, assumed = find_scheduler(path)
        texts = [name for name in TEXTS if index.get(name, [None])[0] is not None]
        return assemble(
            Parts(
                where=str(path),
                configs={name: read_json(path / name / "config.json") for name in (UNET, VAE, *texts)},
                tensors=lambda part: folder_tensors(path / part, STEMS[part]),
                reading=reading,
                tokenizers={name: read_tokenizer(path / name.replace(*PAIR)) for name in texts},
                zero_empty=bool(index.get("force_zeros_for_empty_prompt", False)),
                warnings=[*warnings, *(f"{path}: {line}" for line in (*assumed, *reading.warnings))],
            )
        )

    def describe(self, path: Path) -> dict[str, Any]:
        index = read_json(path / INDEX)
        return {
            "pipeline": index.get("_class_name"),
            "parts": [name for name, place in index.items() if isinstance(place, list) and place[0] is not None],
        }


def check_parts(path: Path, index: Mapping[str, Any]) -> list[str]:
    """Return what of a pipeline is passed over, having refused one of unknown parts, or with code of its own.

    Raises:
        ModelFileError: It has such a part.
    """
    passed = []
    known = {UNET, VAE, *TEXTS, "tokenizer", "tokenizer_2", "scheduler", *PASSED_OVER}
    for name, place in index.items():
        if not isinstance(place, list) or name.startswith("_"):
            continue
        if not place or place[0] is None:
            continue
        if place[0] not in OWNERS:
            whose = str(place[0])[:100]
            raise ModelFileError(f"{path}: its {name} comes from {whose!r}, code that reverie does not run")
        if name not in known:
            raise ModelFileError(f"{path} has a part {name[:60]!r}, which is not supported")
        if name in PASSED_OVER:
            passed.append(f"{path}: its {name} is passed over")
    return passed


def folder_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Return the tensors of a part's folder, mapped from its files; those of archives from copies that are gone."""
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="reverie-") as name:
        scratch = Path(name)
        for file in weight_files(folder, scratch, stem):
            if inside(folder, file.name) == file or file.parent == scratch:
                found |= read_tensors(file, read_header(file).specs)
    return found
