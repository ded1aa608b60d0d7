"""From what was told and what the data is, to what will be trained: the choices, made in one place.

Each is a default that a flag overrides, and the run prints them before it starts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import reverie
from reverie.base.errors import DataError, UsageError
from reverie.data.dataset import Dataset
from reverie.data.words import make_vocabulary
from reverie.diffusion.registry import schedules
from reverie.models.card import Card, CodecSpec, DataRecord, NetworkSpec, SamplingDefaults, ScheduleSpec, WordsSpec
from reverie.models.load import find_device
from reverie.models.model import Model
from reverie.models.speed import native_bfloat16
from reverie.networks import networks
from reverie.networks.dit import DiTConfig
from reverie.networks.edm2 import RATES, SIZES
from reverie.networks.numbered import SLOW
from reverie.training.config import FEW_STEPS, SCORES, TrainConfig
from reverie.training.few_step import RATE, SAMPLING, student_card
from reverie.training.scores import LANGEVIN, largest_noise
from reverie.training.start import start_card
from reverie.training.transformer import TRANSFORMER_PRESETS, TransformerPreset, transformer_config, transformer_words


class Preset(NamedTuple):
    """A size of U-Net: the first level's channels, their growth, blocks a level, and Adam's step size."""

    width: int
    growth: tuple[int, ...]
    layers: int
    learning_rate: float


PRESETS = {
    "tiny": Preset(16, (1, 2, 2, 4, 4, 4), 1, 2e-3),
    "small": Preset(32, (1, 2, 2, 4, 4, 8), 2, 1e-3),
    "base": Preset(64, (1, 2, 2, 4, 4, 8), 2, 5e-4),
    "large": Preset(128, (1, 2, 2, 2, 4, 4), 2, 2e-4),
}
# Of EDM2's network; the learning rates are the paper's, and on smaller widths go on as they do there, by 1/sqrt.
EDM2_PRESETS = {
    "tiny": Preset(16, (1, 2, 3, 4, 5, 6), 1, 0.034),
    "small": Preset(32, (1, 2, 3, 4, 5, 6), 1, 0.024),
    "base": Preset(64, (1, 2, 3, 4, 5, 6), 2, 0.017),
    "large": Preset(128, (1, 2, 3, 4, 5, 6), 3, 0.012),
    **{name: Preset(width, (1, 2, 3, 4, 5, 6), 3, RATES[name]) for name, width in SIZES.items()},
}
ALL_PRESETS: dict[str, Mapping[str, Preset | TransformerPreset]] = {
    "unet": PRESETS,
    "edm2": EDM2_PRESETS,
    "dit": TRANSFORMER_PRESETS,
}
GUIDANCE = 3.0  # of a model that takes prompts, where nobody says otherwise
EDM_SAMPLING = SamplingDefaults(sampler="heun", grid="karras", steps=32)  # as EDM2's paper does
NETWORK_WORDS = {"edm2": "EDM2", "dit": "transformer"}
TABLES = ("linear", "scaled-linear", "cosine", "sigmoid", "sigmoid-in-beta")


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Arguments:
        card: The model.
        device: Where it trains.
        dtype: The network's arithmetic, None for float32.
        learning_rate: Adam's step size after the warm-up.
    """

    card: Card
    device: torch.device
    dtype: torch.dtype | None
    learning_rate: float

    def lines(self) -> list[str]:
        """Return the choices in words, a line each."""
        config = networks[self.card.network.name].Config(**self.card.network.config)  # with what a card leaves out
        network = getattr(config, "unet", None) or getattr(config, "dit", None) or config
        classes = f", {len(self.card.classes)} classes" if self.card.classes else ""
        text = self.card.text if isinstance(self.card.text, WordsSpec) else None
        arithmetic = "float32" if self.dtype is None else "bfloat16"
        data = self.card.data
        codec = self.card.codec
        of = f" of {shape_words(self.card.shape)}" if codec is None else ""
        latents = "x".join(str(size) for size in self.card.shape)
        lines = [
            f"data: {data.name}, {data.count} images{of}{classes}" if data else "",
            f"latents: {latents} by {codec.name}, scale {codec.scale}, shift {codec.shift}" if codec else "",
            f"images: {data.preparation}" if data and data.preparation else "",
            f"captions: {len(text.entries)} words and letters, {text.length} to a caption" if text else "",
            f"network: {NETWORK_WORDS.get(self.card.network.name, 'U-Net')}, {network_words(network)}",
            f"predicts {self.card.prediction} on the {self.card.schedule.name} schedule; {arithmetic} on {self.device}",
        ]
        return [line for line in lines if line]


def network_words(network: Any) -> str:
    """Return the sizes of a network in words."""
    if isinstance(network, DiTConfig):
        return transformer_words(network)
    patches = f"patches of {patch}x{patch}, " if (patch := getattr(network, "patch", 1)) > 1 else ""
    return (
        f"{patches}channels {plain(network.channels)}, {plain(network.layers)} blocks a level, "
        f"attention {plain(network.attention)}"
    )


def plain(value: Any) -> Any:
    """Return a setting as it is shown: a tuple as the list that a card has."""
    return list(value) if isinstance(value, tuple) else value


def shape_words(shape: tuple[int, ...]) -> str:
    """Return a shape (C, H, W) in words.

    Example:
        >>> shape_words((1, 28, 20))
        '28x20 grey'
    """
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}.get(shape[0], f"{shape[0]} channels")
    return f"{shape[1]}x{shape[2]} {kind}"


def make_plan(
    config: TrainConfig,
    dataset: Dataset,
    teacher: Model | None = None,
    start: Model | None = None,
    codec: CodecSpec | None = None,
) -> Plan:
    """Return the plan for a configuration on its data.

    Arguments:
        config: What the run is told.
        dataset: Its data.
        teacher: The model that it begins as and learns from, if any.
        start: The model that it starts from, if any.
        codec: What the data, which is latents then, was made with.

    Raises:
        UsageError: The device is not there, or settings do not fit the data.
    """
    device = find_device(config.device)
    data = DataRecord(
        name=dataset.name[:200],
        fingerprint=dataset.fingerprint,
        count=len(dataset),
        preparation=dataset.preparation,
    )
    if teacher is not None:
        card = with_codec(student_card(config, dataset, teacher, data, reverie.__version__), codec)
        return Plan(card, device, few_step_dtype(config.dtype), config.learning_rate or RATE)
    if start is not None:
        card = with_codec(start_card(config, dataset, start, data, reverie.__version__), codec)
        return Plan(card, device, choose_dtype(config.dtype, device), config.learning_rate or RATE)
    labels = config.labels and bool(dataset.classes) and not config.captions
    text = words_of(dataset) if config.captions else None
    preset = ALL_PRESETS[config.network][choose_preset(config, device)]
    card = Card(
        shape=dataset.shape,
        network=with_span(config, choose_network(config, dataset, preset, labels, text)),
        schedule=schedule_spec(config, largest_noise(config, dataset) if config.objective in SCORES else {}),
        prediction=config.prediction,
        learned_variance=config.learned_variance,
        classes=dataset.classes if labels else (),
        text=text,
        data=data,
        sampling=sampling_defaults(config),
        code=reverie.__version__,
    )
    exact = config.objective in (*FEW_STEPS, *SCORES)
    dtype = few_step_dtype(config.dtype) if exact else choose_dtype(config.dtype, device)
    return Plan(with_codec(card, codec), device, dtype, config.learning_rate or preset.learning_rate)


def with_codec(card: Card, codec: CodecSpec | None) -> Card:
    """Return a card with its codec: latents are in no range that x_0 could be kept within."""
    if codec is None:
        return card
    sampling = card.sampling.model_copy(update={"clip": False, "threshold": None})
    return card.model_copy(update={"codec": codec, "sampling": sampling})


def sampling_defaults(config: TrainConfig) -> SamplingDefaults:
    """Return how the model is sampled where nobody says otherwise."""
    if config.schedule == "edm" and config.objective == "simple":
        return EDM_SAMPLING.model_copy(update={"guidance": GUIDANCE if config.captions else EDM_SAMPLING.guidance})
    if config.captions:
        return SamplingDefaults(guidance=GUIDANCE)
    if config.objective in SCORES and config.schedule == "ve":
        return LANGEVIN
    return SAMPLING.get(config.objective, SamplingDefaults())


def words_of(dataset: Dataset) -> WordsSpec:
    """Return the vocabulary of a data set's captions.

    Raises:
        DataError: It has none.
    """
    captions = [dataset.caption(i) for i in range(len(dataset))]
    given = [caption for caption in captions if caption]
    if not given:
        raise DataError(
            f"{dataset.name} has no captions (a metadata.jsonl with text, or a .txt beside each image); "
            "leave --captions out"
        )
    vocabulary = make_vocabulary(given)
    return WordsSpec(entries=vocabulary.entries, length=vocabulary.length)


def choose_network(
    config: TrainConfig, dataset: Dataset, preset: Preset | TransformerPreset, labels: bool, text: WordsSpec | None
) -> NetworkSpec:
    """Return the network of a run."""
    if isinstance(preset, TransformerPreset):
        dit = transformer_config(config, dataset, preset, labels)
        return NetworkSpec(name="dit", config=dit) if text is None else captioned("dit", dit, text, preset.width)
    return network_spec(network_config(config, dataset, preset, labels), text, preset)


def network_spec(unet: dict[str, Any], text: WordsSpec | None, preset: Preset) -> NetworkSpec:
    """Return the U-Net, with an encoder of words before it where there are captions."""
    if "sample_size" not in unet:
        return NetworkSpec(name="edm2", config=unet)
    if text is None:
        return NetworkSpec(config=unet)
    return captioned("unet", unet | {"positions": True}, text, 4 * preset.width)


def captioned(part: str, inner: dict[str, Any], text: WordsSpec, width: int) -> NetworkSpec:
    """Return a network of images with an encoder of words before it, of so many channels."""
    words = {"vocabulary": len(text.entries) + 1, "length": text.length, "width": width}
    return NetworkSpec(name="captioned", config={"words": words, part: inner})


def with_span(config: TrainConfig, spec: NetworkSpec) -> NetworkSpec:
    """Return the network, told how far a step goes where the objective is of such steps."""
    if config.objective != "mean-flow":
        return spec
    return NetworkSpec(name="numbered", config={"numbers": ["span"], "clock": SLOW, "unet": spec.config})


def choose_preset(config: TrainConfig, device: torch.device) -> str:
    """Return the preset's name: small on a CPU, base on an accelerator, unless one was named."""
    if config.preset != "auto":
        return config.preset
    return "small" if device.type == "cpu" else "base"


def network_config(config: TrainConfig, dataset: Dataset, preset: Preset, labels: bool) -> dict:
    """Return the network's configuration: levels until 8 pixels are left, attention first where 16 or fewer are."""
    (channels, height, width), patch = dataset.shape, config.patch or 1
    side = math.ceil(max(height, width) / patch)
    levels = min(6, max(2, round(math.log2(side / 8)) + 1))
    widths = config.widths or tuple(preset.width * factor for factor in preset.growth[:levels])
    edm2 = config.network == "edm2"
    rule = attending_all if edm2 else attending_words if config.captions else attending
    attention = config.attention or rule(len(widths), side)
    if len(attention) != len(widths):
        raise UsageError(f"attention names {len(attention)} levels, but the network has {len(widths)}: {widths}")
    common = {
        "in_channels": channels,
        "out_channels": channels * (2 if config.learned_variance else 1),
        "channels": list(widths),
        "layers": config.layers or preset.layers,
        "attention": list(attention),
        "dropout": config.dropout,
        "num_class_embeds": len(dataset.classes) + 1 if labels else None,
    }
    if edm2:
        return common | ({"head_dim": config.head_dim} if config.head_dim else {})
    return common | {
        "head_dim": config.head_dim,
        "norm_num_groups": norm_groups(widths),
        "resnet_time_scale_shift": "scale_shift" if config.time_scale_shift else "default",
        "sample_size": [height, width],
        **({"patch": patch} if patch > 1 else {}),
    }


def norm_groups(widths: Sequence[int]) -> int:
    """Return the groups of the norms: up to 32, of four channels at the least.

    In a group of one channel the norm takes away whatever the embedding of time and label added to it.

    Example:
        >>> norm_groups((32, 64, 64)), norm_groups((128, 256)), norm_groups((3, 5))
        (8, 32, 1)
    """
    most = max(1, min(32, min(widths) // 4))
    return max(groups for groups in range(1, most + 1) if math.gcd(*widths) % groups == 0)


def attending_all(levels: int, size: int) -> tuple[bool, ...]:
    """Return which levels of EDM2's network attend: those that have 16 pixels a side or fewer, but for the first.

    Example:
        >>> attending_all(4, 64)
        (False, False, True, True)
    """
    return tuple(level > 0 and size / 2**level <= 16 for level in range(levels))


def attending(levels: int, size: int) -> tuple[bool, ...]:
    """Return which levels attend: the first that has 16 pixels a side or fewer, if it is not the last.

    Example:
        >>> attending(3, 32)
        (False, True, False)
    """
    first = next((level for level in range(levels) if size / 2**level <= 16), levels)
    return tuple(level == first and level < levels - 1 for level in range(levels))


def attending_words(levels: int, size: int) -> tuple[bool, ...]:
    """Return which levels attend where there are captions: from the first on that would without, or all.

    The words are looked at wherever 16 pixels a side or fewer are left, not on one level alone.

    Example:
        >>> attending_words(3, 32), attending_words(2, 32)
        ((False, True, True), (True, True))
    """
    alone = attending(levels, size)
    first = alone.index(True) if any(alone) else 0
    return tuple(level >= first for level in range(levels))


def schedule_spec(config: TrainConfig, own: Mapping[str, float | int | bool] | None = None) -> ScheduleSpec:
    """Return the schedule that is asked for, with options of its own that the data has.

    Raises:
        UsageError: A table's option for a schedule that is none, or one that trains on no eps.
    """
    options: dict[str, float | int | bool] = dict(own or {})
    if config.schedule in TABLES:
        options["timesteps"] = config.timesteps or 1000
        if config.zero_snr:
            options["zero_snr"] = True
    elif config.timesteps is not None or config.zero_snr:
        raise UsageError(f"timesteps and zero_snr belong to a table ({', '.join(TABLES)}), not to {config.schedule}")
    elif config.objective in ("hybrid", "vlb"):
        raise UsageError(f"objective {config.objective} needs a table ({', '.join(TABLES)}), not {config.schedule}")
    schedule = schedules[config.schedule](**options)
    if schedule.zero_terminal_snr and config.prediction in ("eps", "score"):
        raise UsageError(
            f"schedule {config.schedule} ends at zero signal, where {config.prediction} has no meaning; "
            "add --prediction v (or velocity, x0)"
        )
    if schedule.zero_terminal_snr and config.uncertainty:
        raise UsageError(f"uncertainty needs a clock that ends, as {config.schedule} has not; add --schedule edm")
    return ScheduleSpec(name=config.schedule, options=options)


def choose_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the network's dtype, None for float32; "auto" is bfloat16 where the machine multiplies it natively."""
    if name == "float32":
        return None
    return torch.bfloat16 if name == "bfloat16" or fast_bfloat16(device) else None


def few_step_dtype(name: str) -> torch.dtype | None:
    """Return the network's dtype of a run of few steps: float32, as its losses are small differences, unless asked."""
    return torch.bfloat16 if name == "bfloat16" else None


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 products in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and native_bfloat16()
