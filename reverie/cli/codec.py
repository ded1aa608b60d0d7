"""`reverie codec`: train an autoencoder, on whose latents `reverie train --codec` trains."""

import shlex
from pathlib import Path
from typing import Any

import click

from reverie.cli.configfile import read_config
from reverie.cli.console import note, result
from reverie.cli.options import Command, options, settle
from reverie.cli.train import ABOUT, ALIASES, resume_mode
from reverie.training.codec_config import CodecConfig


@click.command(cls=Command, params=[*ABOUT, *options(CodecConfig, ALIASES)], lower="--batch-size, --widths or --size")
def command(config: str | None, resume: str, **flags: Any) -> None:
    """Train an autoencoder of images.

    \b
    reverie codec --data photos/ --size 128 --out runs/codec --minutes 60
    reverie train --data photos/ --size 128 --codec runs/codec --out runs/latents
    """
    mode = resume_mode(resume)
    settings = settle(CodecConfig, flags, read_config(Path(config)) if config else {}, config or "")
    from reverie.training.codec import train_codec

    run = train_codec(settings, mode)
    data = shlex.quote(settings.data)
    note(f"next: reverie train --data {data} --codec {shlex.quote(str(run))} --out runs/latents")
    result(str(run))
