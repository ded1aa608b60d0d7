"""What changes a model without being one: LoRAs, and new words for its prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from reverie.base import storage
from reverie.base.errors import UsageError
from reverie.models.clip_conditioner import ClipConditioner
from reverie.models.formats.pipeline import TEXTS, UNET
from reverie.models.lora import Loras
from reverie.models.model import Model
from reverie.models.speed import refuse_packed
from reverie.models.textual_inversion import add_vectors, read_embedding


@dataclass
class Adapted:
    """What was put on a model.

    Arguments:
        loras: The LoRAs merged into it, whose weights can be changed.
        files: Each file's path, sha256 and weight, as a picture's record has them.
        words: The new words.
        notes: How many tensors of each file were used, in sentences.
    """

    loras: Loras
    files: list[dict[str, str | float | None]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parts_of(model: Model) -> dict[str, nn.Module]:
    """Return the networks of a model that LoRAs may change, by diffusers' names of its parts."""
    parts: dict[str, nn.Module] = {UNET: model.denoiser.network}
    if isinstance(model.conditioner, ClipConditioner):
        parts |= dict(zip(TEXTS, model.conditioner.encoders, strict=False))
    return parts


def adapt(model: Model, loras: Mapping[str, float] | Sequence[str] = (), embeddings: Sequence[str] = ()) -> Adapted:
    """Merge LoRAs into a model, and give its prompts new words.

    Arguments:
        model: The model, whose weights change.
        loras: Files and their weights; of a list, each at weight 1.
        embeddings: Files of textual inversion.

    Raises:
        UsageError: There is no such file, or the model takes no prompts that could have new words.
        ModelFileError: A file is damaged, or for another model.
    """
    refuse_packed(model, "given LoRAs or words")
    if isinstance(model.conditioner, ClipConditioner):
        model.conditioner.keep()
    made = Adapted(Loras(parts_of(model)))
    weights = dict(loras) if isinstance(loras, Mapping) else dict.fromkeys(loras, 1.0)
    for path, weight in weights.items():
        made.notes.append(f"{path}: {made.loras.add(path, weight)}")
        made.files.append({"path": str(path), "sha256": storage.file_digest(Path(path)).sha256, "weight": weight})
    for path in embeddings:
        made.words.append(add_word(model, path))
    return made


def add_word(model: Model, path: Path | str) -> str:
    """Give a model's prompts the new word of a file, and return it."""
    conditioner = model.conditioner
    if not isinstance(conditioner, ClipConditioner):
        raise UsageError(f"{path} holds a word for CLIP's prompts, which this model does not take")
    encoders = dict(zip(TEXTS, conditioner.encoders, strict=False))
    tokens = dict(zip(TEXTS, conditioner.tokens, strict=False))
    widths = {part: int(encoder.config.hidden_size) for part, encoder in encoders.items()}  # type: ignore[union-attr, arg-type]
    word = read_embedding(path, widths)
    for part, vectors in word.vectors.items():
        tokens[part].words[word.name] = add_vectors(encoders[part], vectors, end=tokens[part].end)
    return word.name
