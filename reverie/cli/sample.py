"""`reverie sample`: images from a model, each a PNG that says how it was made; or one of them made again."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from reverie.base.errors import StorageError, UsageError
from reverie.base.registry import Registry
from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, flag, options, setting, settle
from reverie.diffusion.registry import grids, samplers

MOST_SEED = 2**63 - 1


def named(registry: Registry, *others: str) -> Callable[[str | None], str | None]:
    """Return a check that a name is in a registry, or one of some others; it asks for no import of what it names."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in registry and name not in others:
            registry[name]  # says so, with the nearest
        return name

    return check


class Words(BaseModel):
    """What a model that takes prompts is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = setting("what", None, "what to draw, in words", max_length=1 << 20)
    negative_prompt: str | None = setting("what", None, "what guidance leads away from", max_length=1 << 20)
    lora: tuple[str, ...] = setting("what", (), "LoRA files, each as FILE or FILE=WEIGHT")
    embedding: tuple[str, ...] = setting("what", (), "files of new words for prompts (textual inversion)")
    clip_skip: int = setting("what", 0, "last layers of CLIP's text encoder that are left out", ge=0, le=64)
    vocabulary: str | None = setting("what", None, "CLIP's vocabulary, for a file of Stable Diffusion that has none")


class What(Words):
    """What is to be drawn; None means: as the model's card says."""

    n: int | None = setting("what", None, "how many, of each class asked for; 16 if not said", ge=1, le=1_000_000)
    class_: tuple[str, ...] = setting("what", (), "classes by name or number, with commas or repeated; or all")
    seed: int | None = setting("what", None, "the first one's, each next being one more; -1 or nothing: a random one",
                              ge=-1, le=MOST_SEED)  # fmt: skip


class How(BaseModel):
    """How it is to be drawn; None means: as the model's card says."""

    sampler: Annotated[str | None, AfterValidator(named(samplers, "auto"))] = setting(
        "how", None, "sampler: auto, which tune fits to the model; or " + ", ".join(samplers)
    )
    steps: int | None = setting("how", None, "steps of the sampler", ge=1, le=1_000_000)
    grid: Annotated[str | None, AfterValidator(named(grids))] = setting("how", None, "time grid: " + ", ".join(grids))
    times: tuple[int | float, ...] | None = setting(
        "how", None, "a grid of one's own: decreasing times in (0, 1], or a table's timesteps", max_length=100_000
    )
    eta: float | None = setting("how", None, "ddim's share of noise", ge=0, le=1, allow_inf_nan=False)
    variance: Literal["small", "large", "learned"] | None = setting("how", None, "ddpm's variance")
    set_: tuple[str, ...] = setting("how", (), "any other option of the sampler or the grid, as order=2")
    guidance: float | None = setting(
        "how", None, "weight of the class or prompt: 1 is no guidance", allow_inf_nan=False
    )
    guidance_interval: tuple[float, ...] | None = setting(
        "how", None, "two times, as 0.2,0.8: guidance for low < t <= high alone", max_length=2
    )
    guidance_rescale: float | None = setting("how", None, "share of guidance's contrast to take back", ge=0, le=1)
    perturbed: float | None = setting(
        "how", None, "weight of perturbed-attention guidance: 0 is none", allow_inf_nan=False
    )
    bad: str | None = setting("how", None, "a worse model, which guides this one")
    auto_guidance: float | None = setting("how", None, "weight of that guidance: 1 is none", allow_inf_nan=False)
    size: str | None = setting("how", None, "width x height in pixels, as 768x512, or one number for both")
    upscale: int | None = setting(
        "how", None, "draw again, so many times as high and wide, from the picture enlarged", ge=2, le=8
    )
    upscale_strength: float | None = setting(
        "how", None, "how far back the enlarged picture is taken: 0.5 if not said", gt=0, le=1
    )
    clip: bool | None = setting("how", None, "keep the estimate of the image within its range")
    threshold: float | None = setting("how", None, "dynamic thresholding at this quantile", gt=0, le=1)

    @model_validator(mode="after")
    def check_how(self) -> "How":
        """Refuse what does not go together."""
        if self.size is not None and not re.fullmatch(r"\d{1,6}(x\d{1,6})?", self.size):
            raise ValueError(f"size is {self.size!r}; it must be one number, or width x height, as 768x512")
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise ValueError(f"guidance_interval is {self.guidance_interval[0]:g}; it must be two times, as 0.2,0.8")
        if (self.bad is None) != (self.auto_guidance is None):
            raise ValueError("autoguidance needs both: --bad MODEL and --auto-guidance X; give the other, or neither")
        if self.times is not None and self.grid is not None:
            raise ValueError("--times is a grid by itself; leave out --grid")
        return self


class Where(BaseModel):
    """Where the pictures go."""

    out: str = setting("where to", "outputs", "folder for the pictures; nothing in it is overwritten")
    grid_picture: bool = setting("where to", True, "write all on one sheet too")
    animate: bool = setting("where to", False, "write the denoising as an animation too")


class Computing(BaseModel):
    """How fast, and where."""

    speed: Literal["exact", "fast"] = setting(
        "machine", "exact", "fast: bfloat16 where the CPU has it, weights laid out for it; last bits may differ"
    )
    weights: Literal["int8"] | None = setting(
        "machine", None, "hold the network's weights in 8 bits, with --speed fast"
    )
    cache_every: int | None = setting(
        "machine", None, "ask a U-Net's lower levels at every N-th call alone, with --speed fast", ge=2, le=1000
    )
    device: str = setting("machine", "auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = setting("machine", None, "threads that compute; torch's own number", ge=1, le=1024)


class Machine(Computing):
    """What computes, and how."""

    batch_size: int | None = setting("machine", None, "images at a time: memory against speed", ge=1, le=1_000_000)
    dtype: Literal["float32", "bfloat16"] | None = setting("machine", None, "the network's arithmetic")
    ema: str | None = setting("machine", None, "which averaged weights of a run, such as 0.999; none for the others")


class SampleSettings(Machine, Where, How, What):  # the help lists the last base's first
    """What `reverie sample` is told."""

    again: str | None = setting("what", None, "a PNG of reverie's: make that picture again")

    @model_validator(mode="after")
    def check(self) -> "SampleSettings":
        """Refuse what has no effect on a picture that is made again."""
        beside = sorted(self.model_fields_set - {"again", "out", "device"})
        if self.again is not None and beside:
            words = ", ".join(flag(name) for name in beside)
            raise ValueError(
                f"--again makes the picture as its record says, so {words} would have no effect; leave it out"
            )
        return self


ALIASES = {
    "n": ("--n", "--num-images", "--count"),
    "class_": ("--classes", "--label"),
    "seed": ("-s",),
    "sampler": ("--sampling-method",),
    "steps": ("--num-inference-steps",),
    "grid": ("--spacing", "--scheduler", "--timestep-spacing"),
    "prompt": ("-p",),
    "negative_prompt": ("--negative",),
    "size": ("--resolution",),
    "guidance": ("--cfg-scale", "--guidance-scale"),
    "perturbed": ("--pag-scale",),
    "out": ("-o", "--output", "--output-dir"),
    "animate": ("--animation",),
    "batch_size": ("-b",),
    "threads": ("-t",),
}


@click.command(
    cls=Command,
    params=[
        click.Argument(["model"], required=False),
        *options(SampleSettings, ALIASES),
        Option(["--json"], is_flag=True, help="Print one JSON object: files, seeds, settings.", group="where to"),
    ],
    lower="--batch-size",
)
def command(model: str | None, json: bool, **flags: Any) -> None:
    """Make images with a model: a run, a checkpoint, a diffusers folder, a .safetensors file.

    \b
    reverie sample runs/digits -n 64 --class 7 --out sevens/
    reverie sample runs/digits -n 4 --class all --guidance 2 --seed 0
    reverie sample runs/shapes -n 4 --prompt "two small red stars at the top left"
    reverie sample runs/digits --class 7 --bad runs/digits/checkpoints/step-00000500 --auto-guidance 2
    reverie sample --again sevens/00003-seed12.png
    """
    settings = settle(SampleSettings, flags)
    if settings.again is None and model is None:
        raise UsageError(
            "missing MODEL: name a run or a model, as in reverie sample runs/NAME; see reverie sample --help"
        )
    check_place(Path(settings.out))
    from reverie.cli import drawing  # torch comes with it

    made = drawing.sample(settings, str(model)) if settings.again is None else drawing.repeat(settings, model)
    if json:
        emit(made)
    else:
        result(
            "\n".join(str(path) for path in (*made["files"], made.get("grid_picture"), made.get("animation")) if path)
        )


def check_place(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before hours go into what it was to hold."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--out {folder}: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK):
        raise StorageError(f"--out {folder}: {there} can't be written to; choose another folder")
