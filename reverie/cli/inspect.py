"""`reverie inspect`: what a path holds."""

import click

from reverie.base.errors import ModelFileError
from reverie.cli.console import emit, result
from reverie.cli.options import Command, Option


@click.command(
    cls=Command,
    params=[
        click.Argument(["path"]),
        Option(["--json"], is_flag=True, help="Print one JSON object.", group="output"),
    ],
    lower="what else runs on this machine: the model is read into memory",
)
def command(path: str, json: bool) -> None:
    """Say what a run, a checkpoint, a model, a file of weights or a picture is.

    Of a run: what it learned from, how far it came, and which of its checkpoints can be used. Of a picture
    of reverie's, or of a program that writes its settings as it does: how it was made.
    """
    from reverie.models.inspect import describe, describe_text

    found = describe(path)
    if found.keys() > {"path", "kind", "problem"} or "problem" not in found:
        emit(found) if json else result(describe_text(found))
    if "problem" in found:
        raise ModelFileError(str(found["problem"]))
