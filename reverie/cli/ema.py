"""`reverie ema`: averaged weights of any length, after the training; and which length is best."""

from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, flag, options, setting, settle

Length = Annotated[float, Field(gt=0, lt=0.2886, allow_inf_nan=False)]
FOR_SWEEP = ("lengths", "metric", "samples", "steps", "plot")


class EmaSettings(BaseModel):
    """What `reverie ema` is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma_rel: Length | None = setting("what", None, "relative length of the average, a share of the run")
    updates: int | None = setting("what", None, "as it was after so many updates; the last snapshot's", ge=1)
    out: str | None = setting("what", None, "where the model goes; RUN/model-ema-LENGTH")

    sweep: bool = setting("sweep", False, "try several lengths instead, and say which is best; --out writes that one")
    lengths: tuple[Length, ...] = setting(
        "sweep", (0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25), "which, with commas", min_length=1, max_length=100
    )
    metric: Literal["loss", "frechet"] = setting(
        "sweep", "loss", "loss on what was held out, or samples' Frechet distance from the data"
    )
    samples: int = setting("sweep", 1000, "samples of a distance", ge=128, le=1_000_000)
    steps: int | None = setting("sweep", None, "steps of the sampler; the model's own", ge=1, le=10_000)
    plot: str | None = setting("sweep", None, "the figure's file, .svg; RUN/ema-sweep-METRIC.svg")

    device: str = setting("machine", "auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = setting("machine", None, "threads that compute; torch's own number", ge=1, le=1024)

    @model_validator(mode="after")
    def check(self) -> "EmaSettings":
        """Refuse what does not go together."""
        if self.sweep == (self.sigma_rel is not None):
            raise ValueError("give one of --sigma-rel 0.1, for a length, and --sweep, to try several")
        if beside := [flag(name) for name in FOR_SWEEP if name in self.model_fields_set and not self.sweep]:
            raise ValueError(f"{', '.join(beside)} would have no effect without --sweep; leave it out")
        if beside := [flag(n) for n in ("samples", "steps") if n in self.model_fields_set and self.metric == "loss"]:
            raise ValueError(f"{', '.join(beside)} would have no effect on --metric loss; leave it out")
        return self


@click.command(
    cls=Command,
    params=[
        click.Argument(["run"]),
        *options(EmaSettings, {"sigma_rel": ("--length", "--std"), "threads": ("-t",), "out": ("-o", "--output")}),
        Option(["--json"], is_flag=True, help="Print one JSON object.", group="output"),
    ],
    lower="--samples",
)
def command(run: str, json: bool, **flags: Any) -> None:
    """Average a run's weights over any length, from the snapshots that it kept. Nothing is trained.

    \b
    reverie ema runs/digits --sigma-rel 0.12 --out digits-0.12
    reverie ema runs/digits --sweep --metric frechet
    """
    settings = settle(EmaSettings, flags)
    from reverie.cli import averaging  # torch comes with it

    made = averaging.sweep(settings, run) if settings.sweep else averaging.rebuild(settings, run)
    emit(made) if json else result(averaging.text(made))
