"""What a network is told of its training data: classes, captions, or nothing."""

from collections.abc import Sequence

import torch

from reverie.data.dataset import Dataset
from reverie.data.words import Vocabulary
from reverie.models.card import Card, WordsSpec
from reverie.models.conditioning import Told


class Conditions:
    """What the network is told of each sample of a data set.

    Arguments:
        card: The model's: its classes, or how it reads captions.
        dataset: The data.

    Example:
        >>> from reverie.data import open_dataset
        >>> from reverie.models.card import NetworkSpec
        >>> digits = open_dataset("digits")
        >>> card = Card(shape=digits.shape, network=NetworkSpec(config={}), classes=digits.classes)
        >>> Conditions(card, digits)([0, 7])
        Told(condition={'label': tensor([0, 7])}, nothing={'label': tensor([10, 10])})
    """

    def __init__(self, card: Card, dataset: Dataset) -> None:
        self.card, self.dataset = card, dataset
        text = card.text
        self.vocabulary = Vocabulary(text.entries, text.length) if isinstance(text, WordsSpec) else None

    def __call__(self, indices: Sequence[int]) -> Told | None:
        """Return what is said of some samples, and what stands for nothing."""
        if self.vocabulary is not None:
            tokens = self.vocabulary([self.dataset.caption(i) or "" for i in indices])
            return Told({"tokens": tokens}, {"tokens": torch.zeros_like(tokens)})
        labels = self.dataset.labels(indices) if self.card.classes else None
        if labels is None:
            return None
        return Told({"label": labels}, {"label": torch.full_like(labels, self.card.null_label)})
