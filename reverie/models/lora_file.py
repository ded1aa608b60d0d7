"""What is in a LoRA file: the factors of each layer's change, whatever the layout; see `lora.py` for those."""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.checkpoints import first, nonfinite
from reverie.models.formats.files import read_json
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.weights import Header, read_header, read_tensors
from reverie.networks.lora import Factors

# A tensor's name as a layer's and which factor it is; older files of diffusers name the layer in between.
ROLES = (
    re.compile(r"(?P<layer>.+)\.processor\.(?P<which>to_[qkv]|to_out)_lora\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>down|up|mid)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>[AB])(?:\.[\w-]+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<role>alpha)"),
)
SAME = {"A": "down", "B": "up"}
# What changes a weight in another way: to leave it out would be to give other pictures than its maker's.
OTHER_KINDS = {
    re.compile(r"\.hada_"): "LoHa",
    re.compile(r"\.lokr_"): "LoKr",
    re.compile(r"\.(dora_scale|lora_magnitude_vector)"): "DoRA",
    re.compile(r"\.oft_"): "OFT",
    re.compile(r"\.on_input$"): "IA3",
    re.compile(r"\.(diff|diff_b|w_norm|b_norm)$"): "change of whole weights",
    re.compile(r"\.lora_B(\.[\w-]+)?\.bias$"): "LoRA with biases",
}
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in the header
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraFile:
    """The changes that a file holds.

    Arguments:
        where: The file.
        factors: Each layer's change, by the layer's name in the file.
        tensors: The names of the tensors that each is made of.
        others: The names of the tensors that belong to no layer.
    """

    where: str
    factors: dict[str, Factors]
    tensors: dict[str, tuple[str, ...]]
    others: tuple[str, ...] = ()


def read_lora(path: Path | str) -> LoraFile:
    """Return what a LoRA file holds, or PEFT's folder of one.

    Raises:
        UsageError: There is nothing.
        ModelFileError: It is damaged, holds NaN or infinity, is no LoRA, or one of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"there is no {path}; check the path")
    settings: dict[str, Any] = {}
    if path.is_dir():
        settings, path = read_json(path / PEFT_CONFIG), path / PEFT_WEIGHTS
        if not path.exists():
            raise ModelFileError(f"{path.parent} has no {PEFT_WEIGHTS}; save the adapter again, as safetensors")
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    if not archive:
        return parse(path, read_header(path), str(path), settings)
    with tempfile.TemporaryDirectory(prefix="reverie-") as scratch:
        turned = as_safetensors(path, Path(scratch) / "lora.safetensors")
        return parse(turned, read_header(turned), str(path), settings)


def parse(path: Path, header: Header, where: str, settings: Mapping[str, Any]) -> LoraFile:
    """Return what a safetensors file holds, its header having been read."""
    layers: dict[str, dict[str, str]] = {}
    others = []
    for name in header.specs:
        if kind := next((kind for sign, kind in OTHER_KINDS.items() if sign.search(name)), None):
            raise ModelFileError(f"{where}: {name} makes it a {kind}, which is not supported")
        found = role_of(name)
        if found is None:
            others.append(name)
            continue
        layer, role = found
        if role in layers.setdefault(layer, {}):
            raise ModelFileError(f"{where}: {layer} has two tensors for {role}; use another file")
        layers[layer][role] = name
    if not any({"up", "down"} & roles.keys() for roles in layers.values()):
        some = ", ".join(list(header.specs)[:3]) or "none"
        raise ModelFileError(f"{where} is no LoRA: none of its {len(header.specs)} tensors is a factor ({some})")
    if halves := [layer for layer, roles in layers.items() if not {"up", "down"} <= roles.keys()]:
        raise ModelFileError(f"{where}: {len(halves)} layers lack one of their two factors: {first(halves)}")
    tensors = read_tensors(path, [name for roles in layers.values() for name in roles.values()])
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or nonfinite(value)]:
        raise ModelFileError(f"{where}: {len(bad)} tensors hold NaN, infinity or no numbers: {first(bad)}")
    peft = adapter_settings(header.metadata, where) | dict(settings)
    factors = {
        layer: joined(layer, {role: tensors[name].clone() for role, name in roles.items()}, peft, where)
        for layer, roles in layers.items()
    }
    names = {layer: tuple(roles.values()) for layer, roles in layers.items()}
    return LoraFile(where, factors, names, tuple(others))


def role_of(name: str) -> tuple[str, str] | None:
    """Return the layer that a tensor is of, and which factor of its change; None where it is none.

    Example:
        >>> role_of("unet.mid_block.attentions.0.to_q.lora_A.weight")
        ('unet.mid_block.attentions.0.to_q', 'down')
    """
    for pattern in ROLES:
        if found := pattern.fullmatch(name):
            layer, role = found["layer"], found["role"]
            if which := found.groupdict().get("which"):
                layer = f"{layer}.{which}" + (".0" if which == "to_out" else "")
            return layer, SAME.get(role, role)
    return None


def joined(layer: str, tensors: Mapping[str, Tensor], peft: Mapping[str, Any], where: str) -> Factors:
    """Return the change of one layer.

    Raises:
        ModelFileError: Its factors do not go together.
    """
    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    rank = down.shape[0] if down.ndim else 0
    fits = up.ndim in (2, 4) and down.ndim in (2, 4) and up.shape[1] == rank > 0 and set(up.shape[2:]) <= {1}
    if mid is not None:
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (rank, rank) and set(down.shape[2:]) <= {1}
    alpha = tensors.get("alpha")
    if not fits or (alpha is not None and alpha.numel() != 1):
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items())
        raise ModelFileError(f"{where}: the factors of {layer} do not go together: {shapes}")
    scale = scale_of(layer, rank, peft) if alpha is None else float(alpha) / rank
    return Factors(up, down, scale, mid)


def scale_of(layer: str, rank: int, peft: Mapping[str, Any]) -> float:
    """Return what a layer's change is multiplied by, from PEFT's settings; 1 where there are none."""
    part = layer.partition(".")[0]
    known = {key.removeprefix(f"{part}."): value for key, value in peft.items()}
    patterns = known.get("alpha_pattern")
    alpha = known.get("lora_alpha", rank)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if layer.endswith(pattern):
            alpha = value
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelFileError(f"PEFT's settings say lora_alpha = {str(alpha)[:50]}; it must be a number")
    return alpha / (math.sqrt(rank) if known.get("use_rslora") else rank)


def adapter_settings(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return PEFT's settings from a header's metadata.

    Raises:
        ModelFileError: They are damaged.
    """
    if METADATA not in metadata:
        return {}
    try:
        settings = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ModelFileError(f"{where}: {METADATA} in its header is no JSON object; save the LoRA again")
    return settings
