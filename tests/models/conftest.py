"""Small models with random weights, large enough to make samples that differ."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, ScheduleSpec
from reverie.models.model import Model

Make = Callable[..., Model]
UNET = {"in_channels": 1, "channels": [8, 16], "layers": 1, "attention": [False, True]}


def make_model(network: Mapping[str, Any] | None = None, seed: int = 0, **card: Any) -> Model:
    """Return an 8x8 model with random weights; the schedule is a table of 40 unless said otherwise."""
    config = UNET | dict(network or {})
    settings = {"shape": (1, 8, 8), "schedule": ScheduleSpec(options={"timesteps": 40})} | card
    made = Card(network=NetworkSpec(config=config), **settings)
    denoiser = build(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            # Norms stay near 1, so that numbers neither vanish nor explode through the layers.
            parameter.copy_(noise / fan_in**0.5 if parameter.ndim > 1 else ("norm" in name) * 1.0 + 0.1 * noise)
    return Model(denoiser, made)


@pytest.fixture
def make() -> Make:
    """Return the function that makes a model."""
    return make_model


@pytest.fixture
def model() -> Model:
    """Return a model without classes."""
    return make_model()


@pytest.fixture
def classy() -> Model:
    """Return a model of three classes."""
    return make_model({"num_class_embeds": 4}, classes=("zero", "one", "two"))
