r"""A model of classes as a model of one of them, which any program draws that knows no classes.

A label enters the U-Net by its embedding, added to that of the time, which ends with a linear layer:

    emb = W h(t) + b + e_label = W h(t) + (b + e_label),                                             (1)

so that the embedding of one label can be put into that layer's bias for good.
"""

from torch import Tensor

from reverie.base.errors import UsageError
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec
from reverie.models.model import Model
from reverie.models.settling import find_class
from reverie.models.speed import refuse_packed

BIAS, EMBEDDING = "time_embedding.linear_2.bias", "class_embedding.weight"


def fold_class(model: Model, name: int | str | None = None) -> Model:
    """Return the model that draws one class of another, and has no classes itself.

    Arguments:
        model: A model of classes, whose network is a U-Net.
        name: The class, by name or index; None for no class, where the model has a label for that.

    Raises:
        UsageError: The model has no classes, or not that one, or another network.
    """
    refuse_packed(model, "folded")
    card = model.card
    if not card.classes or card.network.name != "unet":
        raise UsageError(
            f"a class is folded into a U-Net of classes; this is a {card.network.name} of {len(card.classes)}"
        )
    if name is None and not card.unconditional:
        raise UsageError("this model has no label for no class; name a class")
    label = card.null_label if name is None else find_class(card, name)
    state = dict(model.denoiser.network.state_dict())
    embedding: Tensor = state.pop(EMBEDDING)
    state[BIAS] = state[BIAS] + embedding[label]
    denoiser = build(folded(card), "meta")
    denoiser.network.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    denoiser.dtype = model.denoiser.dtype
    return Model(denoiser, folded(card))


def folded(card: Card) -> Card:
    """Return the card of a model without its classes."""
    config = card.network.config | {"num_class_embeds": None}
    network = NetworkSpec(name=card.network.name, config=config)
    return card.model_copy(update={"network": network, "classes": (), "unconditional": True})
