"""`reverie convert`: a model in another layout."""

import click

from reverie.cli.console import emit, note, result
from reverie.cli.options import Command, Option

LAYOUTS = ("diffusers", "original", "native", "single-file")


@click.command(
    cls=Command,
    params=[
        click.Argument(["source"]),
        click.Argument(["target"]),
        Option(["--to"], type=click.Choice(LAYOUTS), required=True, help="The layout to write.", group="what"),
        Option(["--overwrite"], is_flag=True, help="Replace a model that is there.", group="what"),
        Option(["--vocabulary"], help="CLIP's vocabulary, for a file that has none.", group="what"),
        Option(["--json"], is_flag=True, help="Print one JSON object.", group="output"),
    ],
    lower="what else runs on this machine: the model is read into memory",
)
def command(source: str, target: str, to: str, overwrite: bool, vocabulary: str | None, json: bool) -> None:
    """Write a model in another layout; there and back, every tensor is what it was.

    \b
    reverie convert sd15.safetensors sd15/ --to diffusers
    reverie convert sd15/ again.safetensors --to original
    reverie convert runs/digits digits.safetensors --to single-file
    """
    import os

    from reverie.models.clip_tokens import VARIABLE
    from reverie.models.formats.conversion import convert

    if vocabulary is not None:
        os.environ[VARIABLE] = vocabulary
    made = convert(source, target, to, overwrite)
    for line in made.notes:
        note(f"warning: {line}")
    if made.carried:
        note(f"{made.carried} tensors that {to} has no place for go along beside it, and back again")
    told = {"target": str(made.target), "layout": made.kind, "tensors": made.tensors, "carried": made.carried}
    emit(told) if json else result(str(made.target))
