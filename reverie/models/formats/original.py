"""One file of Stable Diffusion's original layout, .safetensors or .ckpt: recognised by the names of its tensors."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError
from reverie.models.card import SamplingDefaults, ScheduleSpec
from reverie.models.clip_tokens import find_vocabulary, read_tokenizer
from reverie.models.formats.base import Format, refuse_ema
from reverie.models.formats.files import what_is
from reverie.models.formats.latent_diffusion import Layout, describe
from reverie.models.formats.latent_diffusion.renaming import convert
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.pipeline import TEXTS, Parts, assemble
from reverie.models.formats.scheduler import Reading
from reverie.models.formats.weights import Header, read_header, read_tensors
from reverie.models.model import Model

PADS = {("sd2", "text_encoder"): "!", ("sdxl", "text_encoder_2"): "!", ("sdxl-refiner", "text_encoder_2"): "!"}
STEPS = 30


class OriginalFile(Format):
    """One file in the original layout."""

    name = "original"
    sign = "a .safetensors or .ckpt file of Stable Diffusion"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and (pickled(path) or in_layout(path))

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
            file = as_safetensors(path, Path(scratch) / "weights.safetensors") if pickled(path) else path
            header = read_header(file)
            layout = layout_of(header, path)
            if "unet" not in layout.configs:
                raise ModelFileError(f"{path} is an autoencoder alone; name a whole model")
            return assemble(parts_of(layout, header, file, path))

    def describe(self, path: Path) -> dict[str, Any]:
        if pickled(path):
            return {"layout": "an archive of PyTorch's"}
        layout = layout_of(read_header(path), path)
        counts = {part: len(shapes) for part, shapes in layout.parts.items()}
        return {"layout": f"{layout.family}, {layout.task}", "tensors": counts, "left out": len(layout.left)}


def pickled(path: Path) -> bool:
    """Return whether a file is an archive of torch.save's."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and zipfile.is_zipfile(path)


def in_layout(path: Path) -> bool:
    """Return whether a file is a safetensors file whose tensors have names of this layout."""
    try:
        if what_is(path) is not None:
            return False
        header = read_header(path)
    except ModelFileError:  # another format says what is wrong with it
        return False
    try:
        return describe({name: spec.shape for name, spec in header.specs.items()}, header.metadata) is not None
    except ModelFileError:  # of this layout, and not sound: `read` says so
        return True


def layout_of(header: Header, path: Path) -> Layout:
    """Return the layout of a file that must have one.

    Raises:
        ModelFileError: It has none.
    """
    try:
        layout = describe({name: spec.shape for name, spec in header.specs.items()}, header.metadata)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    if layout is None:
        raise ModelFileError(f"{path} is no Stable Diffusion: none of its tensors has a name of that layout")
    return layout


def parts_of(layout: Layout, header: Header, file: Path, path: Path) -> Parts:
    """Return the parts of a file, its tensors mapped when they are asked for.

    Raises:
        UsageError: There is no vocabulary for its text encoders.
    """
    every = read_tensors(file, [name for name in header.specs if name not in layout.left])
    vocabulary = find_vocabulary()
    texts = [name for name in TEXTS if name in layout.configs]
    return Parts(
        where=str(path),
        configs=layout.configs,
        tensors=lambda part: convert(layout.rules[part], every.__getitem__),
        reading=Reading(
            schedule=ScheduleSpec(name="scaled-linear", options={"zero_snr": True} if layout.zero_snr else {}),
            prediction=layout.prediction,
            learned_variance=False,
            sampling=SamplingDefaults(sampler="dpmpp-2m", grid="trailing", steps=STEPS),
            warnings=(),
        ),
        tokenizers={name: read_tokenizer(vocabulary, PADS.get((layout.family, name))) for name in texts},
        zero_empty=layout.family == "sdxl",
        warnings=[f"{path}: {line}" for line in layout.warnings],
    )
