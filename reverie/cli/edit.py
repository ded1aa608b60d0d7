"""`reverie edit`: a picture drawn anew, the whole of it or a part."""

from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator

from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option, options, setting, settle
from reverie.cli.sample import MOST_SEED, Computing, Words, check_place, named
from reverie.diffusion.registry import grids, samplers


class EditSettings(Computing, Words):
    """What `reverie edit` is told; None means: as the model's card says."""

    task: Literal["inpaint", "colourise", "super-resolution", "interpolate"] | None = setting(
        "what",
        None,
        "what a consistency model does with it, untrained: inpaint, colourise, super-resolution, interpolate",
    )
    factor: int | None = setting(
        "what", None, "super-resolution: how many times as high and wide; to the model's size", ge=2, le=64
    )
    with_: str | None = setting("what", None, "interpolate: the picture at the other end, of --n in all")
    mask: str | None = setting("what", None, "a picture of the same size: white is drawn anew, black stays bit for bit")
    outpaint: tuple[int, ...] | None = setting(
        "what", None, "pixels to add and to draw: left,top,right,bottom, or one number for all sides", max_length=4
    )
    class_: str | None = setting("what", None, "what to draw, of a model with classes")
    strength: float | None = setting(
        "what", None, "how far back: 0 leaves the picture, 1 is from noise; 0.8, or 1 with a mask", ge=0, le=1
    )
    n: int = setting("what", 1, "how many", ge=1, le=100_000)
    seed: int | None = setting("what", None, "the first one's, each next being one more; a random one if not said",
                              ge=-1, le=MOST_SEED)  # fmt: skip
    sampler: Annotated[str | None, AfterValidator(named(samplers))] = setting("how", None, "sampler")
    steps: int | None = setting("how", None, "steps of the sampler: exactly so many run", ge=1, le=1_000_000)
    grid: Annotated[str | None, AfterValidator(named(grids))] = setting("how", None, "time grid")
    set_: tuple[str, ...] = setting("how", (), "any other option of the sampler or the grid, as order=2")
    guidance: float | None = setting("how", None, "weight of the class or prompt", allow_inf_nan=False)
    out: str = setting("where to", "outputs", "folder for the pictures; nothing in it is overwritten")
    ema: str | None = setting("machine", None, "which averaged weights of a run")


ALIASES = {
    "prompt": ("-p",),
    "negative_prompt": ("--negative",),
    "strength": ("--denoising-strength",),
    "seed": ("-s",),
    "guidance": ("--cfg-scale", "--guidance-scale"),
    "out": ("-o", "--output"),
    "threads": ("-t",),
}


@click.command(
    cls=Command,
    params=[
        click.Argument(["model"]),
        click.Argument(["image"]),
        *options(EditSettings, ALIASES),
        Option(["--json"], is_flag=True, help="Print one JSON object: files, seeds, settings.", group="where to"),
    ],
    lower="-n",
)
def command(model: str, image: str, json: bool, **flags: Any) -> None:
    """Draw a picture anew, or what a mask leaves of it.

    \b
    reverie edit runs/shapes red.png --prompt "a large blue star in the centre" --strength 0.9
    reverie edit sd15/ photo.png --mask sky.png --prompt "a sky with clouds"
    reverie edit runs/quick small.png --task super-resolution --factor 4
    reverie edit sd15/ photo.png --outpaint 128,0,128,0 --prompt "a wide landscape"
    """
    settings = settle(EditSettings, flags)
    check_place(Path(settings.out))
    from reverie.cli import drawing  # torch comes with it

    made = drawing.edit(settings, model, image)
    emit(made) if json else result("\n".join(made["files"]))
