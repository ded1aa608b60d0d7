"""From a path to a model, ready to be sampled."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from reverie.base.errors import UsageError
from reverie.models.clip_tokens import VARIABLE
from reverie.models.formats import read_model
from reverie.models.memory import memory_errors
from reverie.models.model import Model, mapped
from reverie.models.settling import settle_dtype
from reverie.models.speed import hasten, settle_speed

DEVICES = ("cpu", "cuda", "mps", "xpu")


def load(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ema: str | None = None,
    vocabulary: Path | str | None = None,
    loras: Mapping[str, float] | Sequence[str] = (),
    embeddings: Sequence[str] = (),
    clip_skip: int = 0,
    speed: str = "exact",
    weights: str | None = None,
) -> Model:
    """Return the model at a path: a run, one of its checkpoints, a diffusers folder, one of ours, or one file.

    Stable Diffusion 1, 2 and XL are opened from diffusers' folder and from one file of the original layout.

    Nothing is fetched from anywhere, and nothing in the model's files is run.

    Arguments:
        path: Where it is.
        device: Where it is to compute.
        dtype: What its network is to compute in: float32, or bfloat16.
        ema: Of a run or a checkpoint, which averaged weights: "0.999", or "none" for those not averaged.
        vocabulary: CLIP's, for a file that has none: a folder with vocab.json and merges.txt, or OpenAI's file.
        loras: LoRA files with their weights, or a list of them; merged into the weights.
        embeddings: Files of textual inversion, whose words prompts may have.
        clip_skip: Last layers of CLIP's text encoder that are left out.
        speed: "fast" for bfloat16 where the machine has it, weights laid out for the processor and batches of any
            size; a sample's last bits are then not its own.
        weights: "int8" for a network whose weights are held in eight bits; with speed fast, on a CPU.

    Raises:
        UsageError: There is nothing at that path, no such device, dtype or weights.
        ModelFileError: It is no model, or one that is damaged, foreign or hostile.
        OutOfMemoryError: The device has not enough memory.

    Warns:
        RuntimeWarning: Something went otherwise than hoped for, such as a damaged checkpoint passed over.
    """
    target = find_device(device)
    network_dtype = None if dtype is None else settle_dtype(dtype)
    settle_speed(speed, weights)
    with named_vocabulary(vocabulary), mapped() if speed == "fast" else nullcontext():
        model = read_model(path, ema)
    if vocabulary is not None and not getattr(model.card.text, "encoders", ()):
        raise UsageError(f"vocabulary {vocabulary} has no effect on a model without CLIP's text encoder; leave it out")
    if loras or embeddings:
        from reverie.models.adapting import adapt

        model.adapted = adapt(model, loras, embeddings)
    if clip_skip:
        skip_layers(model, clip_skip)
    for sentence in model.warnings:
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    if dtype is not None:
        model.denoiser.dtype = network_dtype
    with memory_errors(f"{path} on {target}", "the model's size, or use another device"):
        model.to(target)
        if speed == "fast":
            hasten(model, network_dtype, weights, dtype is not None)
        return model


@contextmanager
def named_vocabulary(path: Path | str | None) -> Iterator[None]:
    """A block in which CLIP's vocabulary is at a path, where one is given."""
    before = os.environ.get(VARIABLE)
    if path is not None:
        os.environ[VARIABLE] = str(path)
    try:
        yield
    finally:
        if path is not None:
            os.environ.pop(VARIABLE)
            os.environ |= {} if before is None else {VARIABLE: before}


def skip_layers(model: Model, count: int) -> None:
    """Leave out the last layers of a model's text encoder.

    Raises:
        UsageError: It has none, or not so many.
    """
    layers = [config.get("num_hidden_layers", 12) for config in getattr(model.card.text, "encoders", ())]
    if not layers or not 0 <= count < min(layers) - 1:
        most = f"at most {min(layers) - 2}" if layers else "this model has no text encoder of CLIP's"
        raise UsageError(f"clip_skip is {count}; {most}")
    model.conditioner.skip = count  # type: ignore[union-attr]


def find_device(device: str | torch.device) -> torch.device:
    """Return a device that is there, and computes; "auto" is a GPU where there is one.

    Raises:
        UsageError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        known = target.type in DEVICES and not (target.type == "cpu" and target.index)
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise UsageError(f"device {str(device)[:40]} is not there; it may be auto, cpu, cuda or cuda:N")
    try:
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        why = f" ({why})" if len(why) < 100 else ""
        raise UsageError(f"device {device!s} is not there{why}; use cpu, or auto") from None
    return target
