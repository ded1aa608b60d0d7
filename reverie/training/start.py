r"""Training that starts from a model: its network, schedule, prediction and vocabulary, and its weights.

A network that learns to fill in gets 1 + C channels more at its input, for the mask and for what it leaves of the
picture,

    W' = [W, 0],    W'(x, mask, x (1 - mask)) = W(x),                                                      (1)

and starts as the model that it came from, whatever stands beside x.

References:
    GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (Nichol et al., 2022),
    on image inpainting
    https://arxiv.org/abs/2112.10741
"""

from typing import Any

import torch
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.data.dataset import Dataset
from reverie.diffusion.schedules import Schedule
from reverie.models.builders import build_schedule
from reverie.models.card import Card, ClipSpec, DataRecord, NetworkSpec, SamplingDefaults, WordsSpec
from reverie.models.checkpoints import Spec, check_tensors
from reverie.models.load import load
from reverie.models.model import Model
from reverie.training.config import TrainConfig

NETWORKS = ("unet", "captioned", "edm2", "dit")
FILLING = ("unet", "captioned")
ENTRY = "conv_in.weight"  # what new channels are added to


def read_start(config: TrainConfig, device: str = "cpu") -> Model | None:
    """Return the model that a run starts from; None for none.

    Raises:
        UsageError: There is no such model, or it is one that this run can't start from.
        ModelFileError: It is damaged.
    """
    if config.start is None:
        return None
    model = load(config.start, device=device)
    if wrong := next(refusals(config, model), None):
        raise UsageError(f"{config.start} {wrong}")
    return model


def refusals(config: TrainConfig, model: Model) -> Any:
    """Yield why a run can't start from a model, in words that follow its name."""
    card = model.card
    if card.kind != "image" or card.network.name not in NETWORKS:
        yield f"is a {card.network.name} of {card.kind}s; training starts from {', '.join(NETWORKS)} of images"
    if isinstance(card.text, ClipSpec):
        yield "reads prompts by CLIP's encoders, which training does not go on with yet"
    if card.learned_variance != config.learned_variance:
        has, do = ("has a", "add") if card.learned_variance else ("has no", "leave out")
        yield f"{has} learned variance; {do} --learned-variance and its --objective"
    if isinstance(card.text, WordsSpec) != config.captions:
        yield "reads captions; add --captions" if card.text else "reads no captions; leave --captions out"
    if not card.unconditional and card.classes and config.label_dropout:
        yield "has no label for nothing; add --label-dropout 0"
    if filling(card) and not config.fill:
        yield "fills in; add --fill"
    if config.fill and card.codec is not None:
        yield "is a model of latents, in which --fill does not train"
    if config.fill and card.network.name not in FILLING:
        yield f"is a {card.network.name}, which has no place for a mask; --fill is for {', '.join(FILLING)}"
    if config.fill and "dit" in card.network.config:
        yield "is a transformer, which has no place for a mask"
    if build_schedule(card.schedule).zero_terminal_snr and config.uncertainty:
        yield "has a clock that does not end, which uncertainty needs; leave it out"


def filling(card: Card) -> bool:
    """Return whether a card's network sees a mask and what it leaves of a picture beside its input."""
    inner = card.network.config.get("unet", card.network.config)
    return card.kind == "image" and inner.get("in_channels", 3) == 2 * card.shape[0] + 1


def start_card(config: TrainConfig, dataset: Dataset, model: Model, data: DataRecord, code: str) -> Card:
    """Return the card of a run that starts from a model: the model's own, on this data, with its digest in it.

    Raises:
        UsageError: The data is not of the model's shape, has other classes, or no captions.
    """
    card = model.card
    if dataset.shape != card.shape:
        raise UsageError(
            f"{config.start} is a model of {card.shape}; {dataset.name} as it is read here is {dataset.shape}"
        )
    if card.classes and (not config.labels or dataset.classes != card.classes):
        raise UsageError(
            f"{config.start} has {len(card.classes)} classes ({', '.join(card.classes[:3])}, ...); {dataset.name} as "
            "it is read here has others"
        )
    if not card.classes and "labels" in config.model_fields_set and config.labels:
        raise UsageError(f"{config.start} has no classes; leave --labels out")
    if config.captions and not any(dataset.caption(i) for i in range(len(dataset))):
        raise UsageError(f"{config.start} reads captions, and {dataset.name} has none")
    changes = {"network": network_of(config, card), "data": data, "training": None, "code": code}
    return card.model_copy(update=changes | {"teacher": model.digest, "sampling": sampling_of(card)})


def network_of(config: TrainConfig, card: Card) -> NetworkSpec:
    """Return a model's network with this run's dropout, and with channels for a mask where it is to fill in."""
    changes: dict[str, Any] = {"dropout": config.dropout}
    if config.fill:
        changes["in_channels"] = 2 * card.shape[0] + 1
        changes["out_channels"] = card.shape[0] * (2 if card.learned_variance else 1)
    whole = card.network.config
    inner = next((part for part in ("unet", "dit") if part in whole), None)
    changed = {**whole, inner: whole[inner] | changes} if inner else whole | changes
    return card.network.model_copy(update={"config": changed})


def sampling_of(card: Card) -> SamplingDefaults:
    """Return how the result is sampled: as the model, but without solvers fitted to it, and never in a few steps."""
    if card.sampling.sampler in ("consistency", "mean-flow"):
        return SamplingDefaults()
    return card.sampling.model_copy(update={"fitted": ()})


def start_with(network: nn.Module, model: Model, where: str) -> None:
    """Give a network a model's weights; channels that are new at its input have zeros: equation (1).

    Raises:
        ModelFileError: They do not fit.

    Example:
        >>> from reverie.models.builders import build
        >>> spec = NetworkSpec(config={"in_channels": 1, "channels": [8, 8]})
        >>> model = Model(build(Card(shape=(1, 8, 8), network=spec)), Card(shape=(1, 8, 8), network=spec))
        >>> fills = spec.model_copy(update={"config": spec.config | {"in_channels": 3, "out_channels": 1}})
        >>> network = build(Card(shape=(1, 8, 8), network=fills)).network
        >>> start_with(network, model, "a model")
        >>> network.conv_in.weight[:, 1:].abs().max().item()
        0.0
    """
    own = network.state_dict()
    state = {name: widened(name, value, own.get(name)) for name, value in model.denoiser.network.state_dict().items()}
    check_tensors(own, {name: Spec.of(value) for name, value in state.items()}, where)
    network.load_state_dict(state)


def widened(name: str, value: Tensor, place: Tensor | None) -> Tensor:
    """Return a weight with zeros for the channels that are new at the input, or as it is."""
    entry = name == ENTRY or name.endswith(f".{ENTRY}")
    if not entry or place is None or place.shape[1] <= value.shape[1]:
        return value
    wide = torch.zeros_like(place, device=value.device)
    wide[:, : value.shape[1]] = value
    return wide


def starts_on(schedule: Schedule, config: TrainConfig) -> bool:
    """Return whether times are to be drawn as EDM's are, as nothing is said and the model's schedule is EDM's."""
    from reverie.diffusion.schedules import EDM

    return config.start is not None and "times" not in config.model_fields_set and isinstance(schedule, EDM)
