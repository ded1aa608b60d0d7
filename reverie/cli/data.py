"""`reverie data`: what a data set is, before anyone trains on it."""

from typing import Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field

from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, options, settle


class DataSettings(BaseModel):
    """How the data is to be read, as for training; None means: chosen from the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | None = Field(None, description="height and width in pixels; from the data", ge=1, le=4096)
    channels: Literal[1, 3, 4] | None = Field(None, description="grey, RGB or RGBA; from the data")
    on_bad: Literal["refuse", "skip"] = Field(
        "skip", description="files that can't be read beyond --max-bad: end, as training does, or report them"
    )
    max_bad: float = Field(0.01, description="share of unreadable files that training skips", ge=0, le=1)
    limit: int | None = Field(None, description="look at N samples alone, spread evenly", ge=1)


@click.command(
    cls=Command,
    params=[
        click.Argument(["source"]),
        *options(DataSettings, {"size": ("--resolution",)}),
        Option(["--json"], is_flag=True, help="Print one JSON object."),
    ],
    lower="--size or --limit",
)
def command(source: str, json: bool, **flags: Any) -> None:
    """Report on a data set, before training on it.

    Files that can't be read, with the reason; sizes, channels, classes, captions, exact duplicates; a
    fingerprint; and how training would prepare the images. SOURCE is what `reverie train --data` takes:
    digits, shapes, a folder or an archive of images, IDX or .npz files, hub:OWNER/NAME.
    """
    settings = settle(DataSettings, flags)
    from reverie.data.report import report

    found = report(source, **settings.model_dump())
    emit(found.to_json()) if json else result(found.to_text())
