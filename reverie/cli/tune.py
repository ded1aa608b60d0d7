"""`reverie tune`: fit a solver to a model, for the few evaluations that it is to be sampled with."""

from typing import Any

import click
from pydantic import BaseModel, ConfigDict

from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, options, setting, settle


class TuneSettings(BaseModel):
    """What `reverie tune` is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[int, ...] = setting("what", ..., "evaluations to fit a solver for, with commas", min_length=1)
    guidance: float | None = setting("what", None, "the guidance that it is for; the model's own", allow_inf_nan=False)
    store: bool = setting("what", True, "keep it in the model's card, for --sampler auto")

    samples: int | None = setting("effort", None, "trajectories to fit to; by their size", ge=2, le=10_000)
    walks: int | None = setting("effort", None, "candidate grids; 20", ge=1, le=100_000)
    rounds: int | None = setting("effort", None, "rounds of polishing; 12, fewer for many steps", ge=0, le=10_000)
    seed: int = setting("effort", 0, "seed of the trajectories", ge=0, le=2**31)
    device: str = setting("effort", "auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = setting("effort", None, "threads that compute; torch's own number", ge=1, le=1024)
    ema: str | None = setting("effort", None, "which averaged weights of a run, such as 0.999; none for the others")


ALIASES = {"guidance": ("--cfg-scale", "--guidance-scale"), "seed": ("-s",), "threads": ("-t",)}


@click.command(
    cls=Command,
    params=[
        click.Argument(["model"]),
        *options(TuneSettings, ALIASES),
        Option(["--json"], is_flag=True, help="Print one JSON object.", group="output"),
    ],
    lower="--samples",
)
def command(model: str, json: bool, **flags: Any) -> None:
    """Fit a solver to a model, so that a few evaluations do what many would. The network is not trained.

    \b
    reverie tune runs/digits --steps 5,8,12
    reverie sample runs/digits -n 64 --sampler auto --steps 8
    """
    settings = settle(TuneSettings, flags)
    from reverie.cli import tuning  # torch comes with it

    made = tuning.tune(settings, model)
    emit(made) if json else result(tuning.text(made))
