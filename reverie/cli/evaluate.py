"""`reverie evaluate`: how good a model is, or pictures, beside real images; each figure with error and settings."""

from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, Field, model_validator

from reverie.base.errors import UsageError
from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, flag, options, setting, settle
from reverie.cli.sample import ALIASES as SAMPLE_ALIASES
from reverie.cli.sample import MOST_SEED, How, Machine, What, check_place

Metric = Literal["frechet", "kid", "prdc", "nearest", "gap", "likelihood"]
OF_LIKELIHOOD = ("images", "probes", "draws", "tolerance")


class Beside(BaseModel):
    """The real images."""

    against: str | None = setting("beside what", None, "the real images: what reverie train --data takes")
    real: int | None = setting(
        "beside what", None, "how many of them; with features classifier half of them, 10,000 at most", ge=2
    )
    held_out: str | None = setting(
        "beside what", None, "images that were not trained on, for nearest, gap and likelihood; of a run, its own"
    )


class EvaluateSettings(Machine, How, What, Beside):  # the help lists the last base's first
    """What `reverie evaluate` is told; None means: as the model's card says."""

    n: int | None = setting("what", None, "how many samples; 1000, of pictures all", ge=1, le=1_000_000)
    class_: tuple[str, ...] = setting(
        "what", (), "classes to draw, in the real images' shares, and to compare to those alone; or all"
    )
    seed: int | None = setting("what", 0, "the first sample's, each next being one more; also the likelihood's",
                               ge=0, le=MOST_SEED)  # fmt: skip
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = setting(
        "measures", ("frechet", "kid", "prdc", "nearest"), "which: frechet, kid, prdc, nearest, gap, likelihood"
    )
    features: Literal["pixels", "classifier"] | None = setting(
        "measures", None, "space of frechet, kid and prdc; classifier where there are classes, else pixels"
    )
    features_from: str | None = setting(
        "measures", None, "labelled images for the classifier; the half of the real ones that is not compared to"
    )
    neighbours: int = setting("measures", 5, "k of prdc: the neighbour that makes a radius", ge=1, le=1000)
    images: int = setting("measures", 64, "images of the likelihood, held out where some are", ge=1, le=1_000_000)
    probes: int = setting("measures", 2, "of its ODE's trace, for each image; 0 is the exact trace", ge=0, le=1000)
    draws: int = setting("measures", 1, "places drawn for each image's bytes; two tell its own error", ge=1, le=1000)
    tolerance: float = setting("measures", 1e-3, "rtol and atol of its ODE", gt=0, lt=1)
    picture: str | None = setting("measures", None, "a new PNG: samples, each beside the nearest training image")

    @model_validator(mode="after")
    def check(self) -> "EvaluateSettings":
        """Refuse what would have no effect on the metrics that are asked for."""
        if self.against is None:
            raise ValueError("--against is missing: name the real images, as in reverie evaluate runs/digits "
                             "--against digits")  # fmt: skip
        for metric, names in (("likelihood", OF_LIKELIHOOD), ("prdc", ("neighbours",))):
            if metric not in self.metrics and (found := [name for name in names if name in self.model_fields_set]):
                raise ValueError(f"{', '.join(map(flag, found))}: of metric {metric}, which is not asked for")
        return self


ALIASES = {name: names for name, names in SAMPLE_ALIASES.items() if name in EvaluateSettings.model_fields}


@click.command(
    cls=Command,
    params=[
        click.Argument(["model_or_folder"]),
        *options(EvaluateSettings, ALIASES),
        Option(["--json"], is_flag=True, help="Print one JSON object: every figure with its settings.", group="output"),
    ],
    lower="--batch-size or -n",
)
def command(model_or_folder: str, json: bool, **flags: Any) -> None:
    """Measure a model, or a folder of pictures, beside real images.

    \b
    reverie evaluate runs/digits --against digits -n 1000 --steps 20
    reverie evaluate runs/digits --against digits --metrics gap,likelihood --images 128
    reverie evaluate sevens/ --against digits --features pixels --picture nearest.png
    """
    settings = settle(EvaluateSettings, flags)
    if settings.picture is not None:
        check_place(Path(settings.picture).absolute().parent)
        if Path(settings.picture).exists():
            raise UsageError(f"--picture {settings.picture} is there already; choose another name")
    from reverie.cli import evaluating  # torch comes with it

    found = evaluating.evaluate(settings, model_or_folder)
    emit(found.to_json()) if json else result(found.to_text())
