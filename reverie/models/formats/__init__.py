"""Model formats: a folder or a file is recognised by what is in it, never by its name.

A new format is one file here (a class that is a `Format`) and one line in `formats`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reverie.base.errors import ModelFileError, ReverieError, UsageError
from reverie.base.registry import Registry
from reverie.models.formats.base import Format
from reverie.models.model import Model
from reverie.models.speed import refuse_packed

_HERE = "reverie.models.formats"

# In the order in which they are asked whether they recognise a path.
formats = Registry(
    "model format",
    {
        "run": f"{_HERE}.run_folder:RunFolder",
        "checkpoint": f"{_HERE}.run_folder:CheckpointFolder",
        "stable-diffusion": f"{_HERE}.stable_diffusion:StableDiffusionFolder",
        "latent-diffusion": f"{_HERE}.latent_folder:LatentFolder",
        "diffusers": f"{_HERE}.diffusers_folder:DiffusersFolder",
        "original": f"{_HERE}.original:OriginalFile",
        "native": f"{_HERE}.native_folder:NativeFolder",
        "edm2-pickle": f"{_HERE}.edm2_pickle:EDM2Pickle",
        "single-file": f"{_HERE}.single_file:SingleFile",
    },
)


def recognise(path: Path | str) -> Format:
    """Return the format of what is at a path.

    Raises:
        UsageError: There is nothing at that path.
        ModelFileError: There is something, and it is no model; the message says what would be one.
    """
    path = existing(path)
    with readable(path):
        for name in formats:
            known: Format = formats[name]()
            if known.recognises(path):
                return known
        held = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else []
    signs = "; ".join(formats[name].sign for name in formats)
    raise ModelFileError(f"{path} is no model (it holds {', '.join(held) or 'nothing'}); a model is {signs}")


def existing(path: Path | str) -> Path:
    """Return a path at which there is something.

    Raises:
        UsageError: There is nothing.
    """
    if not isinstance(path, str | Path) or path == "":
        raise UsageError(f"the path of a model is {path!r}; it must be text, or a path")
    try:
        there = Path(path).exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise UsageError(f"there is no {str(path)[:200]!r}: {error}") from None
    if not there:
        raise UsageError(f"there is no {path}{hub_advice(str(path))}")
    return Path(path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system refuses inside the block into a ModelFileError about a path."""
    try:
        yield
    except ReverieError:
        raise
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error


def hub_advice(name: str) -> str:
    """Return what to do with the name of a model on the hub, where a path looks like one.

    Example:
        >>> hub_advice("runs/digits/model"), hub_advice("google/ddpm-cat-256")[:40]
        ('; check the path', '; if this is a model on the Hugging Face')
    """
    parts = name.split("/")
    plain = all(part and not part.startswith(".") and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
                for part in parts)  # fmt: skip
    if len(parts) != 2 or not plain or Path(parts[0]).exists():
        return "; check the path"
    advice = f"run `hf download {name} --local-dir DIR` and give DIR"
    return f"; if this is a model on the Hugging Face hub, reverie fetches nothing here: {advice}"


def read_model(path: Path | str, ema: str | None = None) -> Model:
    """Return the model at a path: a run, a folder of diffusers' or of ours, or one .safetensors file.

    Arguments:
        path: Where it is.
        ema: Of a run or checkpoint, which averaged weights to take; "none" for those not averaged.

    Raises:
        UsageError: There is nothing at that path, or there are no such weights.
        ModelFileError: It is no model, or one that is damaged, foreign or hostile.
    """
    known = recognise(path)
    with readable(Path(path)):
        return known.read(Path(path), ema)


def write_model(model: Model, path: Path | str, kind: str | None = None, overwrite: bool = False) -> Path:
    """Write a model, whole or not at all.

    Arguments:
        model: The model.
        path: Where: a folder, or a file whose name ends with .safetensors.
        kind: diffusers, native or single-file; the first of them that has words for the model, where None. A model
            of latents becomes diffusers' folder of those (LDMPipeline) where diffusers is asked for.
        overwrite: Replace a model of the same format.

    Returns:
        The path.

    Raises:
        UsageError: There is something there already, or the format can't express the model.
        StorageError: The disk is full, read-only, gone or faulty.
    """
    refuse_packed(model, "saved")
    path = Path(path)
    if kind is None:
        kinds = ("single-file",) if path.suffix == ".safetensors" else ("diffusers", "native")
        kind = next((name for name in kinds if formats[name]().inexpressible(model) is None), kinds[-1])
    if kind == "diffusers" and model.codec is not None:
        kind = "latent-diffusion"
    chosen: Format = formats[kind]()
    if wrong := chosen.inexpressible(model):
        raise UsageError(f"a {kind} model cannot express {wrong}; write a native one")
    chosen.write(model, path, overwrite)
    return path
