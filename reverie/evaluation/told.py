"""What a network is told where nothing is asked for: the likelihood and the loss are those of the model as such."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.data.dataset import Dataset
from reverie.models.model import Model


def check_measurable(model: Model, what: str) -> None:
    """Refuse a model whose numbers are not those of pictures, or whose network is told more than a condition.

    Raises:
        UsageError: It is one.
    """
    if model.card.kind != "image":
        raise UsageError(f"{what} is of pictures, and this is a model of {model.card.kind}")
    if model.codec is not None:
        raise UsageError(f"{what} of latents says nothing of pictures, and this model denoises latents; leave it out")
    if numbers := model.card.network.config.get("numbers"):
        raise UsageError(f"{what} is a denoiser's, and this network is told {', '.join(numbers)} too; leave it out")
    if model.speed.name == "fast":
        raise UsageError(f"{what} is measured in full precision; leave out speed fast")
    if model.fills:
        raise UsageError(f"{what} is not to be had of a model that was trained to fill in")


def unconditional(model: Model, dataset: Dataset, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return what a model is told of some images: no class and no prompt, and their own class where it must have one.

    Raises:
        UsageError: It must be told a class, and the data has none, or others.
    """
    card, count = model.card, len(indices)
    if card.text is not None:
        assert model.conditioner is not None
        size: Any = card.shape[1:]
        return dict(model.conditioner.encode([""] * count, size, 1, nothing=True))
    if not card.classes:
        return {}
    if card.unconditional:
        return {"label": torch.full((count,), card.null_label, device=model.device)}
    labels = dataset.labels(indices)
    if labels is None or dataset.classes != card.classes:
        raise UsageError(f"this model must be told a class, and {dataset.name} does not have its {len(card.classes)}")
    return {"label": labels.to(model.device)}
