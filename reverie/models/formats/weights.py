"""Weights from a safetensors file: looked at first, compared with the network, and only then mapped.

The file's header says the name, shape and type of every tensor. A network that was built on the device
"meta" has names, shapes and types too, and no numbers. Where the two agree, the tensors are mapped from
the file into the network's place: no second copy is made of what is float32 already.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reverie.base.errors import ModelFileError
from reverie.models.checkpoints import DTYPE_NAMED, Spec, check_tensors, first, nonfinite
from reverie.models.formats.files import what_is

MAX_HEADER = 64 << 20
FLOATS = (torch.float16, torch.bfloat16, torch.float64)  # what is taken for float32


class Header(NamedTuple):
    """What a safetensors file says before its numbers."""

    specs: dict[str, Spec]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Return a safetensors file's header, the file being sound as far as its length and its offsets tell.

    Raises:
        ModelFileError: It is something else, or is damaged.
    """
    try:
        entries = parse_header(path)
        with safe_open(path, framework="pt") as file:  # looks for gaps, overlaps, lengths
            metadata = dict(file.metadata() or {})
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelFileError(f"{path} is no sound safetensors file: {error}; download it again") from None
    specs = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPE_NAMED:
            raise ModelFileError(f"{path}: {name} is of the type {entry['dtype']}, which is not supported")
        specs[name] = Spec(tuple(entry["shape"]), DTYPE_NAMED[entry["dtype"]])
    return Header(specs, metadata)


def parse_header(path: Path) -> dict[str, Any]:
    """Return the entries of a header, without the metadata, once its length makes sense."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        opening = file.read(1)
        if size < 10 or opening != b"{" or not 2 <= length <= MAX_HEADER:
            raise ModelFileError(f"{path} is {what_is(path) or 'no safetensors file'}")
        if length > size - 8:
            raise ModelFileError(f"{path} is truncated: {size} bytes, of which its header alone takes {length + 8}")
        text = opening + file.read(length - 1)
    try:
        entries = json.loads(text, object_pairs_hook=distinct)
        entries.pop("__metadata__", None)
        whole = all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in entries.values())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"{path} is no sound safetensors file: its header is damaged ({str(error)[:100]})"
        ) from None
    if not whole:
        raise ModelFileError(f"{path} is no sound safetensors file: its header leaves things out")
    return entries


def distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dictionary, having refused a name that is there twice."""
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name is there twice")
    return named


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors of a safetensors file, mapped from it.

    Raises:
        ModelFileError: It cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}; download it again") from error


def install(network: nn.Module, paths: Sequence[Path], where: str, rename: Callable[[str], str] = str) -> None:
    """Give a network that was built on the device "meta" its weights.

    Arguments:
        network: The network.
        paths: The safetensors files that hold them, together.
        where: What to call them in a message.
        rename: From a file's name of a tensor to the network's.

    Raises:
        ModelFileError: They are not this network's, or hold NaN or infinity.
    """
    places: dict[str, tuple[Path, str]] = {}
    found: dict[str, Spec] = {}
    for path in paths:
        for name, spec in read_header(path).specs.items():
            if rename(name) in places:
                raise ModelFileError(f"{where}: {rename(name)} is there twice; use another file")
            places[rename(name)] = path, name
            found[rename(name)] = Spec(spec.shape, torch.float32) if spec.dtype in FLOATS else spec
    check_tensors(network.state_dict(), found, where)

    tensors: dict[str, Tensor] = {}
    for path in paths:
        here = {new: old for new, (place, old) in places.items() if place == path}
        mapped = read_tensors(path, here.values())
        tensors |= {new: mapped[old] for new, old in here.items()}
    fill(network, tensors, where)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors in the place of a network's, as float32 where they are numbers of another length.

    Raises:
        ModelFileError: They are not this network's, or hold NaN or infinity.
    """
    tensors = {name: value.float() if value.dtype in FLOATS else value for name, value in tensors.items()}
    check_tensors(network.state_dict(), tensors, where)
    faults = [f"{name} has {bad} of {t.numel()}" for name, t in tensors.items() if (bad := nonfinite(t))]
    if faults:
        raise ModelFileError(f"{where}: {len(faults)} tensors hold NaN or infinity: {first(faults)}; use another file")
    network.load_state_dict(tensors, strict=True, assign=True)
