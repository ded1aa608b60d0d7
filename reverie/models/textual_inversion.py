"""Textual inversion: new words for a text encoder, each a few vectors in the place of tokens' embeddings.

| layout | what is in the file |
|---|---|
| AUTOMATIC1111's, .pt | `string_to_param`, in it `*`: the vectors (N, D); beside it a name and a step |
| the same as safetensors | `emb_params`: (N, D) |
| diffusers, .bin or .safetensors | the word, as `<cat-toy>`: (D,) or (N, D) |
| SDXL | `clip_l`: (N, 768) and `clip_g`: (N, 1280); or `text_encoders_0` and `text_encoders_1` |

A pickle is read as weights alone, by a child process (`formats/pickled.py`). What a file is called in a
prompt is the word in it, or else the file's name, as on AUTOMATIC1111's web page.

References:
    An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion (Gal et al., 2023)
    https://arxiv.org/abs/2208.01618
    Textual inversion, in diffusers and on AUTOMATIC1111's web page
    https://huggingface.co/docs/diffusers/using-diffusers/textual_inversion_inference
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Textual-Inversion
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.checkpoints import Spec, first, nonfinite
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.weights import read_header, read_tensors

MOST = 75  # vectors: what a prompt has places for
NAMED = {  # the encoder that a tensor's name says its vectors are for
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
UNNAMED = ("string_to_param.*", "emb_params")  # names that are no words


@dataclass(frozen=True)
class Embedding:
    """A new word.

    Arguments:
        name: What stands for it in a prompt.
        vectors: Its vectors (N, D) for each text encoder: text_encoder, text_encoder_2.
    """

    name: str
    vectors: dict[str, Tensor]

    @property
    def count(self) -> int:
        """How many tokens it takes the places of."""
        return len(next(iter(self.vectors.values())))


def read_embedding(path: Path | str, widths: Mapping[str, int], name: str | None = None) -> Embedding:
    """Return the word that a file holds.

    Arguments:
        path: The file.
        widths: Channels of each text encoder that the model has, by part: {"text_encoder": 768}.
        name: What to call it; the word in the file or the file's name, unless given.

    Raises:
        UsageError: There is no file.
        ModelFileError: It is damaged, no embedding, or one for other text encoders.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no {path}; check the path")
    with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"
        source = as_safetensors(path, Path(scratch) / "embedding.safetensors") if archive else path
        specs = read_header(source).specs
        places = placed(specs, widths, str(path))
        found = {part: tensor.clone() for part, tensor in tensors(source, places).items()}
    if bad := [part for part, value in found.items() if not value.is_floating_point() or nonfinite(value)]:
        raise ModelFileError(f"{path}: its vectors for {first(bad)} hold NaN, infinity or no numbers; use another file")
    word = next((key for key in specs if key not in NAMED and key not in UNNAMED), path.stem)
    vectors = {part: value.float().reshape(-1, value.shape[-1]) for part, value in found.items()}
    return Embedding(name or word, vectors)


def tensors(path: Path, places: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of the parts, from the names that they have in a file."""
    read = read_tensors(path, places.values())
    return {part: read[name] for part, name in places.items()}


def placed(specs: Mapping[str, Spec], widths: Mapping[str, int], where: str) -> dict[str, str]:
    """Return which tensor is for which text encoder, by names and shapes.

    Raises:
        ModelFileError: The file is no embedding, or one for other text encoders.
    """
    shapes = {name: tuple(spec.shape) for name, spec in specs.items()}
    counts = {name: shape[0] if len(shape) == 2 else 1 for name, shape in shapes.items()}
    whole = all(len(shape) in (1, 2) and 0 not in shape for shape in shapes.values())
    if not whole or not (shapes.keys() <= NAMED.keys() or len(shapes) == 1) or not shapes:
        held = ", ".join(f"{name[:60]} {shape}" for name, shape in list(shapes.items())[:3]) or "nothing"
        raise ModelFileError(f"{where} is no embedding of textual inversion: it holds {held} ({len(shapes)} tensors)")
    if max(counts.values()) > MOST or len(set(counts.values())) != 1:
        raise ModelFileError(f"{where} has {list(counts.values())} vectors; it must be one number, {MOST} at most")
    # An encoder is told by the tensor's name, or else by its width.
    parts = {NAMED.get(name) or of_width(shape[-1], widths): name for name, shape in shapes.items()}
    theirs = ", ".join(str(shape[-1]) for shape in shapes.values())
    ours = ", ".join(f"{width} ({part})" for part, width in widths.items())
    if parts.keys() != widths.keys() or any(shapes[parts[part]][-1] != width for part, width in widths.items()):
        raise ModelFileError(f"{where} is for text encoders of {theirs} channels; this model has {ours}")
    return {part: name for part, name in parts.items() if part is not None}


def of_width(width: int, widths: Mapping[str, int]) -> str | None:
    """Return the text encoder of so many channels."""
    return next((part for part, channels in widths.items() if channels == width), None)


# In the encoder -------------------------------------------------------------------------------------


def add_vectors(encoder: nn.Module, vectors: Tensor, end: int | None = None) -> list[int]:
    """Give a text encoder of transformers new tokens, and return their numbers.

    Arguments:
        encoder: A CLIPTextModel, with a projection or without; its table of tokens grows.
        vectors: The new tokens' embeddings (N, D).
        end: The token that ends a prompt. Old configs let the largest token be the end, which a new token
            would be; from then on it is this one, which changes nothing for prompts without new tokens.

    Raises:
        UsageError: The vectors are of another width, or the end is to be known and is not given.
    """
    inner: Any = getattr(encoder, "text_model", encoder)
    table: nn.Embedding = inner.embeddings.token_embedding
    if vectors.ndim != 2 or vectors.shape[1] != table.embedding_dim:
        raise UsageError(f"the vectors are {tuple(vectors.shape)}; this encoder takes (N, {table.embedding_dim})")
    if getattr(inner, "eos_token_id", None) == 2:
        if end is None:
            raise UsageError("this encoder takes the largest token for the end; give the number of the end")
        inner.eos_token_id = end
    old = table.num_embeddings
    weight = torch.cat([table.weight.detach(), vectors.to(table.weight)])
    table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(weight)
    return list(range(old, len(weight)))


def split_words(text: str, names: Iterable[str]) -> list[tuple[str, bool]]:
    """Return a text cut at the new words in it, each piece with whether it is one.

    A name counts where no letter, digit, underscore or hyphen touches it, in upper or lower case; of names
    that begin alike the longest does.

    Example:
        >>> split_words("a Cat-Toy, cat-toys", ["cat-toy", "cat"])
        [('a ', False), ('cat-toy', True), (', cat-toys', False)]
    """
    known = {name.lower(): name for name in names}
    if not known:
        return [(text, False)] if text else []
    either = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    pieces, start = [], 0
    for found in re.finditer(rf"(?<![\w-])(?:{either})(?![\w-])", text, re.IGNORECASE):
        pieces += [(text[start : found.start()], False), (known[found.group().lower()], True)]
        start = found.end()
    return [piece for piece in (*pieces, (text[start:], False)) if piece[0]]
