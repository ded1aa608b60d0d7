r"""Prompts as CLIP's tokens: emphasis, and chunks for what is longer than the encoder.

    (a cat)        1.1 times the emphasis            ((a cat))    1.1^2 times
    (a cat:1.3)    1.3 times                         [a cat]      1 / 1.1 times
    \( \) \[ \]    the signs themselves              BREAK        fills up the chunk

A prompt of more tokens than the encoder has places for is cut into chunks of 75, each of them between a beginning
and an end of its own; their encodings stand one after the other.

References:
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021)
    https://arxiv.org/abs/2103.00020
    Emphasis in prompts, as AUTOMATIC1111's web page has it
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis
"""

import gzip
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.textual_inversion import split_words

EMPHASIS = 1.1
BREAK = "BREAK"
MERGES = 48_894  # of CLIP's vocabulary
MAX_FILE = 64 << 20
VARIABLE = "REVERIE_CLIP_VOCABULARY"
SIGNS = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*([+-]?\d*\.?\d+)\s*\)|\)|\]|[^\\()\[\]:]+|[:\\]")


class Piece(NamedTuple):
    """Some words of a prompt, and how much weight is on them."""

    text: str
    weight: float


def emphasised(prompt: str) -> list[Piece]:
    r"""Return a prompt's pieces with their weights. A bracket without its partner is a sign like any other.

    Example:
        >>> [(piece.text, round(piece.weight, 3)) for piece in emphasised("a (red:1.5) [cat] \\(x\\)")]
        [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.909), (' (x)', 1.0)]
    """
    found: list[Piece] = []
    opened: list[tuple[str, int]] = []  # each bracket that is open, and where what it holds begins
    for match in SIGNS.finditer(prompt):
        sign = match.group()
        if sign in ("(", "["):
            opened.append((sign, len(found)))
            found.append(Piece(sign, 1.0))
        elif sign.startswith(":") and match.group(1) and opened and opened[-1][0] == "(":
            close(found, opened.pop()[1], float(match.group(1)))
        elif sign in (")", "]") and opened and opened[-1][0] == {")": "(", "]": "["}[sign]:
            close(found, opened.pop()[1], EMPHASIS if sign == ")" else 1 / EMPHASIS)
        else:
            found.append(Piece(sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign, 1.0))
    return joined(found)


def close(found: list[Piece], start: int, factor: float) -> None:
    """Multiply the weight of all that follows an opening bracket, which goes."""
    del found[start]
    found[start:] = [Piece(piece.text, piece.weight * factor) for piece in found[start:]]


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return pieces with neighbours of equal weight as one."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].weight == piece.weight:
            out[-1] = Piece(out[-1].text + piece.text, piece.weight)
        else:
            out.append(piece)
    return out


class Chunk(NamedTuple):
    """What one call of an encoder reads: tokens, and the weight of each."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


class Tokens:
    """A tokenizer of transformers', with emphasis and chunks.

    Arguments:
        tokenizer: transformers' CLIPTokenizer.
        places: Tokens that the encoder has places for, the beginning and the end among them.
        pad: The token that fills up a chunk.
    """

    def __init__(self, tokenizer: Any, places: int = 77, pad: int | None = None) -> None:
        self.tokenizer, self.places = tokenizer, places
        self.words: dict[str, list[int]] = {}  # new words (textual inversion), and the tokens that they stand for
        self.begin, self.end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id) if pad is None else pad

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without a beginning and an end."""
        found: list[int] = []
        for part, new in split_words(text, self.words):
            found += self.words[part] if new else self.known(part)
        return found

    def known(self, text: str) -> list[int]:
        """Return the tokens of a text without new words."""
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def count(self, prompt: str) -> int:
        """Return how many tokens a prompt has."""
        return sum(len(self.ids(piece.text.replace(BREAK, " "))) for piece in emphasised(prompt))

    def chunks(self, prompt: str, least: int = 1) -> list[Chunk]:
        """Return a prompt's chunks, `least` of them at least."""
        rows: list[list[tuple[int, float]]] = [[]]
        for piece in emphasised(prompt):
            for i, part in enumerate(piece.text.split(BREAK)):
                if i:
                    rows.append([])
                for token in self.ids(part):
                    if len(rows[-1]) == self.places - 2:
                        rows.append([])
                    rows[-1].append((token, piece.weight))
        rows += [[] for _ in range(least - len(rows))]
        return [self.chunk(row) for row in rows]

    def chunk(self, row: Sequence[tuple[int, float]]) -> Chunk:
        """Return tokens between a beginning and an end, filled up."""
        tokens = [self.begin, *(token for token, _ in row), self.end]
        weights = [1.0, *(weight for _, weight in row), 1.0]
        short = self.places - len(tokens)
        return Chunk((*tokens, *[self.pad] * short), (*weights, *[1.0] * short))


# Where the vocabulary comes from --------------------------------------------------------------------


def find_vocabulary(given: Path | str | None = None) -> Path:
    """Return where CLIP's vocabulary is: given, or named by REVERIE_CLIP_VOCABULARY, or in Hugging Face's cache.

    Raises:
        UsageError: It is in none of these places; the message says how to put it there.
    """
    for place in (given, os.environ.get(VARIABLE)):
        if place:
            if not Path(place).exists():
                raise UsageError(f"there is no CLIP vocabulary at {place}; check the path")
            return Path(place)
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cached = sorted((home / "hub").glob("models--openai--clip-vit-large-patch14/snapshots/*/vocab.json"))
    if cached:
        return cached[-1].parent
    raise UsageError(
        "this checkpoint has no vocabulary of its own; give CLIP's (a folder with vocab.json and merges.txt, or "
        f"OpenAI's bpe_simple_vocab_16e6.txt.gz) by --vocabulary PATH, or the variable {VARIABLE}"
    )


def read_tokenizer(path: Path, pad: str | None = None) -> Any:
    """Return transformers' CLIPTokenizer from a folder with vocab.json and merges.txt, or from OpenAI's own file.

    Arguments:
        path: The folder or file.
        pad: The token that fills up; the end's, unless the folder says otherwise.

    Raises:
        ModelFileError: There is no sound vocabulary there.
        UsageError: transformers is not installed.
    """
    tokenizer_class = clip_part("CLIPTokenizer")
    vocabulary, merges = folder_vocabulary(path) if path.is_dir() else original_vocabulary(path)
    fill = pad or (pad_of(path) if path.is_dir() else None) or "<|endoftext|>"
    return tokenizer_class(vocab=vocabulary, merges=merges, pad_token=fill)


def clip_part(name: str) -> Any:
    """Return something of transformers by its name.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("prompts for this model need transformers: pip install 'reverie[text]'") from None
    return getattr(transformers, name)


def folder_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a tokenizer's folder."""
    try:
        vocabulary = json.loads(bounded(folder / "vocab.json"))
        merges = [pair(line) for line in bounded(folder / "merges.txt").splitlines() if usable(line)]
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{folder} has no sound vocab.json and merges.txt: {str(error)[:100]}") from None
    whole = isinstance(vocabulary, dict) and all(isinstance(number, int) for number in vocabulary.values())
    if not whole or not {"<|startoftext|>", "<|endoftext|>"} <= vocabulary.keys():
        raise ModelFileError(f"{folder / 'vocab.json'} is no vocabulary of CLIP: it lacks the marks of begin and end")
    return vocabulary, merges


def pad_of(folder: Path) -> str | None:
    """Return the token that fills up, as a tokenizer's folder names it."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            said = json.loads(bounded(folder / name)).get("pad_token")
        except (ValueError, OSError, AttributeError):
            continue
        text = said.get("content") if isinstance(said, dict) else said
        if isinstance(text, str):
            return text
    return None


def original_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of OpenAI's file of byte pairs.

    Raises:
        ModelFileError: It is another file.
    """
    try:
        with gzip.open(path, "rb") as file:
            lines = file.read(MAX_FILE).decode("utf-8").split("\n")
        merges = [pair(line) for line in lines[1 : MERGES + 1]]
    except (OSError, EOFError, ValueError) as error:
        raise ModelFileError(f"{path} is no bpe_simple_vocab_16e6.txt.gz: {str(error)[:100]}") from None
    if len(merges) != MERGES:
        raise ModelFileError(f"{path} has {len(merges)} merges; CLIP's vocabulary has {MERGES}")
    signs = list(byte_signs())
    entries = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(two) for two in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(entries)}, merges


def byte_signs() -> Iterator[str]:
    """Yield a printable sign for each of the 256 bytes: those that print first, then the others, moved up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


def bounded(path: Path) -> str:
    """Return a text file that is not too large."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path.name} is larger than {MAX_FILE} bytes")
    return path.read_text("utf-8")


def usable(line: str) -> bool:
    """Return whether a line of merges.txt is a merge."""
    return bool(line.strip()) and not line.startswith("#version")


def pair(line: str) -> tuple[str, str]:
    """Return the two halves of a merge."""
    first, second = line.split()
    return first, second


def chunk_count(tokens: int, places: int) -> int:
    """Return how many chunks so many tokens need.

    Example:
        >>> chunk_count(0, 77), chunk_count(75, 77), chunk_count(76, 77)
        (1, 1, 2)
    """
    return max(1, math.ceil(tokens / (places - 2)))
