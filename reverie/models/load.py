"""From a path to a model, ready to be sampled."""

import warnings
from pathlib import Path

import torch

from reverie.base.errors import UsageError
from reverie.models.formats import read_model
from reverie.models.memory import memory_errors
from reverie.models.model import Model
from reverie.models.plan import settle_dtype


def load(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    ema: str | None = None,
) -> Model:
    """Return the model at a path: a run, one of its checkpoints, a diffusers folder, one of ours, or one file.

    Nothing is fetched from anywhere, and nothing in the model's files is run.

    Arguments:
        path: Where it is.
        device: Where it is to compute.
        dtype: What its network is to compute in: float32, or bfloat16.
        ema: Of a run or a checkpoint, which averaged weights: "0.999", or "none" for those not averaged.

    Raises:
        UsageError: There is nothing at that path, no such device, dtype or weights.
        ModelFileError: It is no model, or one that is damaged, foreign or hostile.
        OutOfMemoryError: The device has not enough memory.

    Warns:
        RuntimeWarning: Something went otherwise than hoped for, such as a damaged checkpoint passed over.
    """
    target = find_device(device)
    network_dtype = None if dtype is None else settle_dtype(dtype)
    model = read_model(path, ema)
    for sentence in model.warnings:
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    if dtype is not None:
        model.denoiser.dtype = network_dtype
    with memory_errors(f"{path} on {target}", "the model's size, or use another device"):
        return model.to(target)


def find_device(device: str | torch.device) -> torch.device:
    """Return a device that is there; "auto" is a GPU where there is one.

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
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"device {device!s} is not there ({why}); use cpu, or auto") from None
    return target
