"""`reverie train`: every field of TrainConfig is a flag; a file may hold them too, and a flag overrides it."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from reverie.base.errors import UsageError
from reverie.cli.configfile import read_config
from reverie.cli.console import note, result
from reverie.cli.options import Command, Option, options, settle, shown
from reverie.training.config import TrainConfig

ALIASES = {
    "data": ("--train-data-dir", "--dataset"),
    "out": ("-o", "--output", "--output-dir"),
    "size": ("--resolution",),
    "flip": ("--random-flip",),
    "limit": ("--max-train-samples",),
    "start": ("--from",),
    "steps": ("--max-train-steps",),
    "seed": ("-s",),
    "checkpointing": ("--gradient-checkpointing",),
    "timesteps": ("--num-train-timesteps",),
    "prediction": ("--prediction-type",),
    "batch_size": ("-b", "--train-batch-size"),
    "accumulate": ("--gradient-accumulation-steps",),
    "learning_rate": ("--lr",),
    "warmup": ("--lr-warmup-steps",),
    "decay": ("--lr-scheduler",),
    "weight_decay": ("--adam-weight-decay",),
    "beta2": ("--adam-beta2",),
    "clip_norm": ("--max-grad-norm",),
    "ema": ("--ema-decay",),
    "workers": ("--dataloader-num-workers",),
    "save_every": ("--checkpointing-steps",),
    "keep": ("--checkpoints-total-limit",),
    "validate_every": ("--validation-steps",),
    "track": ("--report-to",),
}
RESUME: dict[str, Literal["no", "yes", "auto"]] = {"yes": "yes", "auto": "auto", "latest": "yes", "no": "no"}

ABOUT = [
    Option(["--config"], metavar="FILE", help="Settings from a .toml or .json file; flags override it.", group="run"),
    Option(
        ["--resume"],
        aliases=["--resume-from-checkpoint"],
        is_flag=False,
        flag_value="yes",
        default="no",
        metavar="[auto]",
        help="Go on with the run in --out, by its own settings; with auto, begin where there is none.",
        group="run",
    ),
]


@click.command(cls=Command, params=[*ABOUT, *options(TrainConfig, ALIASES)], lower="--batch-size, --widths or --size")
def command(config: str | None, resume: str, **flags: Any) -> None:
    """Train a model on images.

    \b
    reverie train --data digits --out runs/digits --minutes 3
    reverie train --data photos/ --out runs/photos --size 64 --batch-size 32
    reverie train --out runs/photos --resume
    """
    mode = resume_mode(resume)
    settings = settle(TrainConfig, flags, read_config(Path(config)) if config else {}, config or "")
    run = trainer()(settings, mode)
    note(f"next: reverie sample {shlex.quote(str(run))} -n 16")
    result(str(run))


def resume_mode(word: str) -> Literal["no", "yes", "auto"]:
    """Return what --resume asks for."""
    if word not in RESUME:
        raise UsageError(f"--resume is {shown(word)}; it takes nothing, or auto, and --out names the run")
    return RESUME[word]


def trainer() -> Callable[[TrainConfig, Literal["no", "yes", "auto"]], Path]:
    """Return the function that trains; importing it takes seconds, which help and refusals need not wait for."""
    from reverie.training.trainer import train

    return train
