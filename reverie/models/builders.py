"""From a card to the objects that it names."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.predictions import EDMOutput, Prediction
from reverie.diffusion.registry import predictions, schedules
from reverie.diffusion.schedules import Schedule, Table
from reverie.models.card import Card, ClipSpec, ScheduleSpec, sentence
from reverie.networks import networks


def build_schedule(spec: ScheduleSpec) -> Schedule:
    """Return the schedule that a card names.

    Raises:
        UsageError: There is none of that name, or it has no such option.

    Example:
        >>> build_schedule(ScheduleSpec(name="cosine", options={"timesteps": 50})).timesteps
        50
    """
    if spec.betas:
        return Table(torch.tensor(spec.betas, dtype=torch.float64))
    try:
        return schedules[spec.name](**spec.options)
    except TypeError as error:
        raise UsageError(f"schedule {spec.name!r} does not take the options {spec.options}: {error}") from None


def build_prediction(card: Card) -> Prediction:
    """Return the prediction that a card names."""
    return EDMOutput(card.sigma_data) if card.prediction == "edm" else predictions[card.prediction]()


def build(card: Card, device: str | torch.device = "cpu") -> NetworkDenoiser:
    """Return the denoiser that a card describes, its weights random; on device "meta" it takes no memory.

    Raises:
        ModelFileError: The network's configuration is not one, or is that of a network for something else.

    Example:
        >>> from reverie.models.card import NetworkSpec
        >>> unet = NetworkSpec(config={"in_channels": 1, "channels": [8, 8]})
        >>> next(build(Card(shape=(1, 8, 8), network=unet), "meta").parameters()).device
        device(type='meta')
    """
    network = networks[card.network.name]
    try:
        config = network.Config(**card.network.config)
    except ValidationError as error:
        raise ModelFileError(f"its network is no {card.network.name}: {sentence(error)}") from None
    if wrong := list(misfits(card, config)):
        raise ModelFileError(f"its network does not fit its card: {'; '.join(wrong)}")
    with torch.device(device):
        net = network(config)
    return NetworkDenoiser(net, build_schedule(card.schedule), build_prediction(card), card.learned_variance)


def misfits(card: Card, config: Any) -> Iterator[str]:
    """Yield where a network's configuration and the card disagree on what goes in and what comes out."""
    if card.kind == "image" and len(card.shape) != 3:
        yield f"an image has the shape (C, H, W), not {card.shape}"
        return
    channels = card.shape[0]
    fills = config.in_channels == 2 * channels + 1 if card.kind == "image" else False
    wanted = {
        # Of a network that fills in, also a mask and what it leaves of the picture.
        "in_channels": config.in_channels if fills else channels,
        "out_channels": 2 * channels if card.learned_variance else channels,
        "num_class_embeds": card.labels,
        "class_embed_type": None,
        "context_dim": config.context_dim if isinstance(card.text, ClipSpec) else None,
    }
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            yield f"{name} is {getattr(config, name)}, the card wants {value}"
