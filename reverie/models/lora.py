"""LoRA files: read in the layouts that they come in, matched with a model's layers, merged and taken out again.

| layout | what a tensor is called |
|---|---|
| kohya | `lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha` |
| kohya, XL | the same with the U-Net's original names, `lora_unet_input_blocks_4_1_...`; `lora_te1_`, `lora_te2_` |
| LoCon | the same for convolutions, perhaps with a `.lora_mid.weight` |
| PEFT in diffusers | `unet.down_blocks.0....to_q.lora_A.weight`, `.lora_B.weight`; `text_encoder.`, `text_encoder_2.` |
| diffusers, older | `unet....attn1.processor.to_q_lora.down.weight`; `...lora.down.weight`, `...lora_linear_layer.` |
| PEFT | `base_model.model.down_blocks...lora_A.weight` |
| ComfyUI | `diffusion_model.input_blocks....lora_up.weight` |

A merged weight is always worked out from the original, W + sum_i w_i scale_i B_i A_i; the original is kept,
so that a weight w is changed, or a LoRA taken out, without a trace.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022)
    https://arxiv.org/abs/2106.09685
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023), for alpha / sqrt(rank)
    https://arxiv.org/abs/2312.03732
    LoRA in diffusers, and in kohya's sd-scripts
    https://huggingface.co/docs/diffusers/api/loaders/lora
    https://github.com/kohya-ss/sd-scripts
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.registry import nearest
from reverie.models.formats.latent_diffusion.both_ways import unet_table
from reverie.models.formats.latent_diffusion.renaming import renamed
from reverie.models.lora_file import LoraFile, read_lora
from reverie.networks.lora import Factors, updated

__all__ = ["LoraFile", "Loras", "Report", "match", "read_lora"]

Place = tuple[str, str]  # a part of a model, and a layer in it
PARTS = {  # what stands before a layer's name, its dots made underscores
    "unet": ("lora_unet_", "unet_", "base_model_model_", ""),
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder_", "lora_text_encoder_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_"),
}
ORIGINAL = ("lora_unet_", "diffusion_model_", "unet_", "")
SIGNS = (  # what is in a name, and what base it is then of
    (("double_blocks", "single_blocks", "single_transformer_blocks"), "Flux"),
    (("joint_blocks",), "Stable Diffusion 3"),
    (("lora_transformer_", "transformer_transformer_blocks", "lora_te3_"), "a diffusion transformer (SD 3, Flux)"),
    (("lora_prior_unet", "stage_c"), "Stable Cascade"),
    (("lora_te2_", "text_encoder_2_"), "Stable Diffusion XL"),
    (("input_blocks_", "down_blocks_", "attentions_"), "Stable Diffusion"),
)
CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "XL's refiner"}


@dataclass(frozen=True)
class Report:
    """What became of a LoRA's tensors.

    Arguments:
        layers: Layers that it changes, for each part.
        used: How many of its tensors are used.
        unused: The names of the others.
    """

    layers: dict[str, int]
    used: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        where = ", ".join(f"{count} layers of the {part}" for part, count in self.layers.items())
        left = f"; {len(self.unused)} are unused: {', '.join(self.unused[:3])}" if self.unused else ""
        return f"{self.used} of {self.used + len(self.unused)} tensors change {where}{left}"


def layers_of(parts: Mapping[str, nn.Module]) -> dict[Place, nn.Module]:
    """Return the layers that a LoRA may change: linear ones and convolutions."""
    return {
        (part, path): layer
        for part, network in parts.items()
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and path
    }


def names_of(parts: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Return what each layer may be called in a LoRA file, its dots made underscores.

    Raises:
        UsageError: A part is none of unet, text_encoder and text_encoder_2.
    """
    names: dict[str, Place] = {}
    for part, network in parts.items():
        if part not in PARTS:
            raise UsageError(f"a LoRA changes {', '.join(PARTS)}; there is no part {part!r}")
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        back = {new: old for old, new in unet_table(shapes).items()} if part == "unet" else {}
        for place in layers_of({part: network}):
            path = place[1]
            if part != "unet" and not path.startswith("text_model."):
                # On the disk a text encoder's names have this in front, whatever the library's version.
                names |= {flat(start + path): place for start in PARTS[part]}
                path = f"text_model.{path}" if path != "text_projection" else path
            names |= {flat(start + path): place for start in PARTS[part]}
            if original := renamed(path, back):
                names |= {flat(start + original): place for start in ORIGINAL}
    return names


def flat(name: str) -> str:
    """Return a name with underscores for its dots."""
    return name.replace(".", "_")


def match(lora: LoraFile, parts: Mapping[str, nn.Module]) -> tuple[dict[Place, Factors], Report]:
    """Return which layer each change of a LoRA is of.

    Arguments:
        lora: The file.
        parts: The networks by part: unet, text_encoder, text_encoder_2.

    Raises:
        ModelFileError: No layer of the model is in the file, or those that are have other shapes.
    """
    names, layers = names_of(parts), layers_of(parts)
    found: dict[Place, Factors] = {}
    wrong: list[str] = []
    unused = list(lora.others)
    for name, factors in lora.factors.items():
        place = names.get(flat(name))
        if place is None:
            unused += lora.tensors[name]
            continue
        if place in found:
            raise ModelFileError(f"{lora.where}: {name} is there twice, under two names; use another file")
        weight = layers[place].weight
        assert isinstance(weight, Tensor)
        if stripped(factors.shape) != stripped(weight.shape):
            wrong.append(f"{name} changes {tuple(factors.shape)}, the model has {tuple(weight.shape)}")
        found[place] = factors
    if wrong:
        raise ModelFileError(
            f"{lora.where} is a LoRA of another base{guess(lora)}: {len(wrong)} of {len(lora.factors)} layers have "
            f"other shapes: {'; '.join(wrong[:3])}"
        )
    if not found:
        some = ", ".join(list(lora.factors)[:3])
        raise ModelFileError(
            f"{lora.where}: none of its {len(lora.factors)} layers is in this model (it has {some}); "
            f"it looks like a LoRA of {looks_like(lora, names)}"
        )
    used = sum(len(tensors) for tensors in lora.tensors.values()) + len(lora.others) - len(unused)
    return found, Report(dict(Counter(part for part, _ in found)), used, tuple(unused))


def stripped(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a weight's shape without the 1x1 pixels of a convolution, which is a matrix as well."""
    shape = tuple(shape)
    return shape[:2] if set(shape[2:]) == {1} else shape


def guess(lora: LoraFile) -> str:
    """Return which base a LoRA is of, by the width of the text that its attention looks at."""
    widths = Counter(
        f.shape[1] for name, f in lora.factors.items() if flat(name).endswith(("attn2_to_k", "attn2_to_v"))
    )
    known = next((CONTEXTS[width] for width, _ in widths.most_common() if width in CONTEXTS), None)
    return f" ({known})" if known else ""


def looks_like(lora: LoraFile, names: Mapping[str, Place]) -> str:
    """Return what base a LoRA is of whose names are none of the model's."""
    for signs, base in SIGNS:
        if any(sign in flat(name) for name in lora.factors for sign in signs):
            return base + guess(lora)
    return "a base that is not known" + nearest(flat(next(iter(lora.factors), "")), names)


class Loras:
    """The LoRAs of a model, merged into its weights, each with a weight that can be changed.

    Arguments:
        parts: The networks by part: unet, text_encoder, text_encoder_2.

    Example:
        >>> loras = Loras({"unet": nn.Sequential(nn.Linear(2, 2))})
        >>> loras.weights
        {}
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        self._layers = layers_of(parts)
        if trained := [path for (_, path), layer in self._layers.items() if is_parametrized(layer, "weight")]:
            raise UsageError(f"{trained[0]} has an adapter that is being trained; merge or remove it first")
        self._loras: dict[str, dict[Place, Factors]] = {}
        self._weights: dict[str, float] = {}
        self._originals: dict[Place, Tensor] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The LoRAs by name, in the order in which they came, with their weights."""
        return dict(self._weights)

    def add(self, lora: LoraFile | Path | str, weight: float = 1.0, name: str | None = None) -> Report:
        """Merge a LoRA with a weight.

        Arguments:
            lora: The file, read or not.
            weight: What its change is multiplied by; 0 leaves it out for now.
            name: What it is called; the file's name without its ending, unless given.

        Returns:
            How many of its tensors were used.

        Raises:
            ModelFileError: It is no LoRA, or one of another base.
            UsageError: There is one of that name already, or the weight is not finite.
        """
        if not isinstance(lora, LoraFile):
            lora = read_lora(lora)
        name = name or Path(lora.where).stem
        if name in self._loras:
            raise UsageError(f"there is a LoRA called {name} already; give this one another name")
        factors, report = match(lora, self._parts)
        self._check({name: weight}, {name})
        self._loras[name], self._weights[name] = factors, weight
        self._merge(factors)
        return report

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Give LoRAs other weights; those that are not named keep theirs.

        Raises:
            UsageError: There is no LoRA of a name, or a weight is not finite.
        """
        self._check(weights, set(self._loras))
        changed = [name for name, weight in weights.items() if weight != self._weights[name]]
        self._weights.update(weights)
        self._merge({place for name in changed for place in self._loras[name]})

    def remove(self, name: str) -> None:
        """Take a LoRA out.

        Raises:
            UsageError: There is none of that name.
        """
        self._check({name: 0.0}, set(self._loras))
        places = self._loras.pop(name)
        del self._weights[name]
        self._merge(places)

    def clear(self) -> None:
        """Take all out: the weights are those of before, bit for bit."""
        for name in list(self._loras):
            self.remove(name)

    def _check(self, weights: Mapping[str, float], known: Iterable[str]) -> None:
        for name, weight in weights.items():
            if name not in known:
                raise UsageError(f"there is no LoRA called {name}{nearest(name, known)}")
            if not math.isfinite(weight):
                raise UsageError(f"the weight of the LoRA {name} is {weight}; it must be a number")

    def _merge(self, places: Iterable[Place]) -> None:
        """Work the weights of some layers out again, from their originals."""
        for place in places:
            weight = self._layers[place].weight
            assert isinstance(weight, Tensor)
            changes = [(w, self._loras[name][place]) for name, w in self._weights.items() if place in self._loras[name]]
            changes = [(w, factors) for w, factors in changes if w != 0]
            original = self._originals.pop(place, weight.data).to(weight.device)
            if changes:
                self._originals[place] = original
            weight.data = updated(original, changes) if changes else original
