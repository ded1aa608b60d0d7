"""EDM2's published networks: the tensors of NVlabs' pickles, without the code in them.

Such a file is a bare pickle of the network as an object, its source text included, which its own reader would run. Here
the pickle is read as data (inert.py), and of that the tensors and a few numbers are taken: a tensor is a shape and
strides over a storage, a storage the bytes of one in PyTorch's older format, which is pickles and numbers again. The
names are translated to ours, frequencies and phases to turns, and queries, keys and values put one after the other.

References:
    Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2023), figure 21
    https://arxiv.org/abs/2312.02696
"""

import math
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.base.errors import ModelFileError
from reverie.models.card import Card, NetworkSpec, SamplingDefaults, ScheduleSpec
from reverie.models.formats.base import Format, build_unfilled, refuse_ema
from reverie.models.formats.inert import Call, Name, Reference, read
from reverie.models.formats.weights import fill
from reverie.models.model import Model

SIGN = b"_reconstruct_persistent_obj"
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
}  # fmt: skip
PLACE = re.compile(r"unet\.(enc|dec)\.(\d+)x\d+_(conv|down|up|in\d|block\d+)\.(.+)", re.ASCII)
LEAVES = {
    "emb_gain": "emb_gain", "conv_res0.weight": "conv_1.weight", "emb_linear.weight": "emb_linear.weight",
    "conv_res1.weight": "conv_2.weight", "conv_skip.weight": "conv_skip.weight",
    "attn_qkv.weight": "attention.qkv.weight", "attn_proj.weight": "attention.out.weight",
}  # fmt: skip
WHOLE = {
    "unet.emb_fourier.freqs": "fourier.frequencies", "unet.emb_fourier.phases": "fourier.phases",
    "unet.emb_noise.weight": "emb_noise.weight", "unet.emb_label.weight": "emb_label.weight",
    "unet.out_conv.weight": "conv_out.weight", "unet.out_gain": "out_gain",
}  # fmt: skip
HEAD = 64  # channels of a head in all of them
MAX_DEPTH = 50
MAX_BYTES = 16 << 30


class EDM2Pickle(Format):
    """One of EDM2's network pickles."""

    name = "edm2-pickle"
    sign = "a .pkl of EDM2's"

    def recognises(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(4096)
        return start[:1] == b"\x80" and SIGN in start

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        network = network_of(opened(path), str(path))
        tensors = dict(tensors_of(network, str(path)))
        card = card_of(attributes(network), tensors, str(path))
        denoiser = build_unfilled(card, str(path))
        fill(denoiser.network, translated(tensors, str(path)), str(path))
        return Model(denoiser, card, str(path))

    def describe(self, path: Path) -> dict[str, Any]:
        tensors = dict(tensors_of(network_of(opened(path), str(path)), str(path)))
        return {"tensors": len(tensors), "layout": "EDM2's network as an object"}


# What lies in the pickle ----------------------------------------------------------------------------


def opened(path: Path) -> Any:
    """Return what a pickle says.

    Raises:
        ModelFileError: It is larger than any network of this kind, or is damaged.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ModelFileError(f"{path} is larger than {MAX_BYTES} bytes; no network of EDM2's is")
    return read(path.read_bytes(), str(path))


def network_of(root: Any, where: str) -> Call:
    """Return the network in the pickle's dictionary, by its usual name."""
    held = contents(root)
    network = next((held[name] for name in ("ema", "net") if name in held), None)
    if not isinstance(network, Call):
        raise ModelFileError(f"{where} holds no network under 'ema' or 'net'; is it one of EDM2's?")
    return network


def contents(value: Any) -> dict[Any, Any]:
    """Return a dictionary, whether it is one or an object that is one too."""
    return value.items if isinstance(value, Call) else value if isinstance(value, dict) else {}


def attributes(module: Call) -> dict[Any, Any]:
    """Return the attributes of a pickled module: of a persistent one they lie in its one argument."""
    if isinstance(module.function, Name) and module.function.name == SIGN.decode():
        meta = contents(module.arguments[0] if module.arguments else None)
        return contents(meta.get("state"))
    return contents(module.state)


def tensors_of(module: Call, where: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a pickled module, by name.

    Raises:
        ModelFileError: A tensor is damaged, or modules lie in each other without end.
    """
    if depth > MAX_DEPTH:
        raise ModelFileError(f"{where}: its modules lie in each other without end")
    held = attributes(module)
    for group in ("_parameters", "_buffers"):
        for name, value in contents(held.get(group)).items():
            if value is not None:
                yield f"{prefix}{name}", tensor(value, f"{where}: {prefix}{name}")
    for name, child in contents(held.get("_modules")).items():
        if isinstance(child, Call):
            yield from tensors_of(child, where, f"{prefix}{name}.", depth + 1)


def tensor(value: Any, where: str) -> Tensor:
    """Return a pickled tensor: a shape and strides over a storage, all of it within."""
    try:
        if str(value.function) in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
            return tensor(value.arguments[0], where)
        if str(value.function) != "torch._utils._rebuild_tensor_v2":
            raise ValueError(f"it is a {value.function}")
        source, offset, size, stride = value.arguments[:4]
        flat = storage(source, where)
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
            raise ValueError("its shape is none")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= len(flat):
            raise ValueError("it reaches beyond its storage")
        if math.prod(size) > len(flat):
            raise ValueError("it repeats its storage")
        return flat.as_strided(size, stride, offset).clone()
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ModelFileError(f"{where} is no tensor that can be read: {error}") from None


def storage(value: Any, where: str) -> Tensor:
    """Return the numbers of a storage that was pickled as the bytes of PyTorch's older format.

    These are five pickles (a magic number, a version, the machine, the storage, the keys of those that follow), then
    for each key its count, and its numbers.
    """
    if str(value.function) != "torch.storage._load_from_bytes":
        raise ValueError(f"its storage is a {value.function}")
    stream = BytesIO(value.arguments[0])
    _, _, _, reference, keys = (read(stream, where) for _ in range(5))
    kind, key, count = (reference.key[i] for i in (1, 2, 4)) if isinstance(reference, Reference) else (None, None, None)
    if not isinstance(kind, Name) or kind.name not in STORAGES or keys != [key] or type(count) is not int:
        raise ValueError(f"its storage is of a kind {kind} that weights are not")
    dtype = STORAGES[kind.name]
    told, data = int.from_bytes(stream.read(8), "little"), stream.read()
    if told != count or len(data) != count * dtype.itemsize:
        raise ValueError(f"its storage has {len(data)} bytes where {count} of {dtype} are due")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


# What it is in our words ------------------------------------------------------------------------------


def card_of(held: Mapping[Any, Any], tensors: Mapping[str, Tensor], where: str) -> Card:
    """Return the card of a network, from its tensors' shapes and the few numbers beside them."""
    try:
        widths, attention, layers = levels(tensors)
        labels = tensors["unet.emb_label.weight"].shape[1] if "unet.emb_label.weight" in tensors else None
        channels = tensors["unet.out_conv.weight"].shape[0]
        config = {
            "in_channels": channels,
            "channels": widths,
            "attention": attention,
            "layers": layers,
            "head_dim": HEAD,
            "noise_channels": tensors["unet.emb_noise.weight"].shape[1],
            "emb_channels": tensors["unet.emb_noise.weight"].shape[0],
            "num_class_embeds": labels,
        }
        size = int(held["img_resolution"])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ModelFileError(f"{where} has not the tensors of EDM2's network: {error}") from None
    return Card(
        shape=(channels, size, size),
        network=NetworkSpec(name="edm2", config=config),
        schedule=ScheduleSpec(name="edm"),
        prediction="edm",
        sigma_data=float(held.get("sigma_data", 0.5)),
        classes=tuple(str(i) for i in range(labels or 0)),
        unconditional=False,
        # What has 4 channels is latents, which no clipping fits.
        sampling=SamplingDefaults(sampler="heun", grid="karras", steps=32, clip=None if channels in (1, 3) else False),
    )


def levels(tensors: Mapping[str, Tensor]) -> tuple[list[int], list[bool], int]:
    """Return the channels and the attention of each level, and the blocks a level."""
    found: dict[int, list[tuple[int, bool]]] = {}
    for name, value in tensors.items():
        match = PLACE.fullmatch(name)
        if match and match[1] == "enc" and match[3].startswith("block") and match[4] == "conv_res0.weight":
            attends = name.replace("conv_res0", "attn_qkv") in tensors
            found.setdefault(int(match[2]), []).append((value.shape[0], attends))
    sizes = sorted(found, reverse=True)
    return [found[s][0][0] for s in sizes], [found[s][0][1] for s in sizes], len(found[sizes[0]])


def translated(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors under our names, and in our order of rows.

    Raises:
        ModelFileError: There is one that has no place.
    """
    order: dict[str, dict[str, int]] = {"enc": {}, "dec": {}}
    ours: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = PLACE.fullmatch(name)
        if name in WHOLE:
            turns = name.startswith("unet.emb_fourier.")
            ours[WHOLE[name]] = value.float() / (2 * math.pi) if turns else value
        elif match and match[3] == "conv":
            ours["conv_in.weight"] = value
        elif match and match[4] in LEAVES:
            place = order[match[1]].setdefault(f"{match[2]}_{match[3]}", len(order[match[1]]))
            side = "encoder" if match[1] == "enc" else "decoder"
            value = apart(value) if match[4] == "attn_qkv.weight" else value
            ours[f"{side}.{place}.{LEAVES[match[4]]}"] = value
        elif not (name.startswith("logvar_") or name.endswith("resample_filter")):
            raise ModelFileError(f"{where}: {name} has no place in EDM2's network")
    return ours


def apart(weight: Tensor) -> Tensor:
    """Return the rows of queries, keys and values, which lie in turn, one kind after the other."""
    return weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
