r"""Captions as numbers: a vocabulary of whole words, with letters for the words that it lacks.

    "a purple star" -> a | purple | star,    "a mauve star" -> a | m a u v e | star

Number 0 fills up to the length, and is all that an empty prompt has. No word is lost: one that the
vocabulary lacks is spelt, and a character that no caption had is passed over and counted.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

MOST_WORDS = 4096
LONGEST = 128  # numbers of a caption, at most
WORD = re.compile(r"\w+|[^\w\s]")
MOST_TEXT = 1 << 16  # characters of a prompt that are looked at


class Spelling(NamedTuple):
    """A caption in a vocabulary.

    Arguments:
        numbers: Which entries, before any is cut.
        unknown: Characters that the vocabulary lacks.
    """

    numbers: list[int]
    unknown: tuple[str, ...]


class Vocabulary:
    """Words and characters, numbered from 1.

    Arguments:
        entries: Words, and characters as "#a": the pieces that other words are spelt with.
        length: How many numbers a caption is filled up to, or cut to.

    Example:
        >>> words = Vocabulary(["a", "star", "#r", "#e", "#d"], length=6)
        >>> words(["a red star", ""]).tolist()
        [[1, 3, 4, 5, 2, 0], [0, 0, 0, 0, 0, 0]]
    """

    def __init__(self, entries: Sequence[str], length: int) -> None:
        self.entries, self.length = tuple(entries), length
        self.number = {entry: i for i, entry in enumerate(self.entries, start=1)}

    def __len__(self) -> int:
        """Return how many numbers there are, 0 among them."""
        return len(self.entries) + 1

    def __call__(self, captions: Sequence[str]) -> Int64[Tensor, "b n"]:
        """Return the numbers (B, length) of captions."""
        table = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            numbers = self.spell(caption).numbers[: self.length]
            table[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return table

    def spell(self, caption: str) -> Spelling:
        """Return a caption's numbers, whole words where there are."""
        numbers, unknown = [], []
        for word in pieces(caption):
            if word in self.number:
                numbers.append(self.number[word])
                continue
            for letter in word:
                if (number := self.number.get(f"#{letter}")) is None:
                    unknown.append(letter)
                else:
                    numbers.append(number)
        return Spelling(numbers, tuple(unknown))


def pieces(caption: str) -> list[str]:
    """Return the words and signs of a caption, in small letters."""
    return WORD.findall(caption[:MOST_TEXT].lower())


def make_vocabulary(captions: Iterable[str], least: int = 2) -> Vocabulary:
    """Return the vocabulary of captions: their characters, and the words that at least so many of them have.

    Example:
        >>> make_vocabulary(["a star", "a circle"]).entries[:3]
        ('a', '#a', '#c')
    """
    counts: Counter[str] = Counter()
    letters: set[str] = set()
    listed = [pieces(caption) for caption in captions]
    for words in listed:
        counts.update(set(words))
        letters.update(*words)
    chosen = sorted(word for word, _ in counts.most_common(MOST_WORDS) if counts[word] >= least)
    vocabulary = Vocabulary([*chosen, *(f"#{letter}" for letter in sorted(letters))], LONGEST)
    longest = max((len(vocabulary.spell(" ".join(words)).numbers) for words in listed), default=1)
    return Vocabulary(vocabulary.entries, min(LONGEST, max(8, 4 * math.ceil(1.5 * longest / 4))))
