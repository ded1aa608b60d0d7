"""What every training run is told: its data, its length, its optimiser, its machine, its reports.

Each field is a flag of the commands that train. No import of torch here, so that `--help` is quick.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def option(group: str, default: Any, help: str, **bounds: Any) -> Any:
    """Return a field with its group and its help, finite where it is a number; a metavar is what the help calls it."""
    extra = {"group": group} | ({"metavar": bounds.pop("metavar")} if "metavar" in bounds else {})
    if {"gt", "ge", "lt", "le"} & set(bounds):
        bounds["allow_inf_nan"] = False
    return Field(default, description=help, json_schema_extra=extra, **bounds)


class RunConfig(BaseModel):
    """What every run is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = option(
        "data", "digits", "digits, shapes, a folder or archive of images, IDX or .npz files, hub:OWNER/NAME"
    )
    out: str = option("data", ..., "the run's folder; must not hold a run yet, unless resumed")
    size: int | None = option("data", None, "height and width in pixels; from the data", ge=1, le=4096)
    channels: int | None = option("data", None, "1 grey, 3 RGB, 4 RGBA; from the data", ge=1, le=4)
    flip: bool = option("data", False, "mirror half of the images, left to right")
    on_bad: Literal["refuse", "skip"] = option(
        "data", "refuse", "files that can't be read beyond --max-bad: end, or go on"
    )
    max_bad: float = option("data", 0.01, "share of unreadable files that is skipped without asking", ge=0, le=1)
    limit: int | None = option("data", None, "use N images alone, spread evenly over the data", ge=1)
    held_out: float = option(
        "data", 0.05, "share of the data kept for the held-out loss, 500 images at most", ge=0, lt=1
    )

    steps: int | None = option("length", None, "optimiser steps; 2000 where --minutes is not given either", ge=1)
    minutes: float | None = option("length", None, "stop after so many minutes of training", gt=0)
    seed: int = option("length", 0, "what all randomness is a function of", ge=0, le=2**63 - 1)

    batch_size: int = option(
        "optimiser", 32, "images in a step; accelerators are busier with 128 or more", ge=1, le=1_000_000
    )
    learning_rate: float | None = option("optimiser", None, "Adam's step size; from the preset", gt=0)
    warmup: int = option("optimiser", 100, "steps over which the learning rate rises", ge=0)
    weight_decay: float = option("optimiser", 0.0, "AdamW's weight decay", ge=0)
    beta2: float = option("optimiser", 0.99, "Adam's second moment", gt=0, lt=1)
    clip_norm: float = option("optimiser", 1.0, "largest norm of the gradient", gt=0)
    spike: float = option("optimiser", 20.0, "skip a step whose gradient is so many times its running mean", gt=1)
    max_bad_steps: int = option("optimiser", 10, "end the run after so many skipped steps in a row", ge=1)

    device: str = option("machine", "auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "machine", "auto", "the network's arithmetic; bfloat16 where it is fast"
    )
    channels_last: bool = option("machine", True, "keep images with their channels innermost")
    workers: int = option("machine", 0, "threads that prepare batches ahead", ge=0, le=64)
    threads: int | None = option("machine", None, "threads that compute; torch's own number", ge=1, le=1024)

    save_every: int = option("reports", 500, "steps between checkpoints", ge=1)
    keep: int = option("reports", 3, "checkpoints kept, at least 2", ge=2)
    sample_every: int = option("reports", 500, "steps between sample grids; 0 for none", ge=0)
    sample_count: int = option("reports", 64, "images in a sample grid", ge=1, le=1024)
    validate_every: int = option("reports", 500, "steps between held-out losses; 0 for none", ge=0)
    log_every: int = option("reports", 10, "steps between lines of metrics.jsonl", ge=1)
    profile: int | None = option("reports", None, "tell where the time of so many steps went", ge=1, le=1000)
    track: tuple[Literal["tensorboard", "wandb"], ...] = option("reports", (), "trackers beside metrics.jsonl")

    @property
    def total_steps(self) -> int | None:
        """The steps after which the run ends; None where the minutes decide."""
        return 2000 if self.steps is None and self.minutes is None else self.steps
