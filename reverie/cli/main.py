"""`reverie`: the group of commands, and the one place where their errors end.

A command's module is imported when the command is called, so that `reverie --help` is quick and a missing
extra of one command is no matter for another.
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

import reverie
from reverie.base.registry import nearest
from reverie.cli.console import drop_unread, note
from reverie.cli.failures import explain, report, terminated

# pydantic would look for plugins in every installed package: a tenth of the time that `train --help` takes.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

COMMANDS = {
    "train": "Train a model on images.",
    "codec": "Train an autoencoder, for diffusion in its latents.",
    "sample": "Make images with a model.",
    "edit": "Draw a picture anew, the whole of it or a part.",
    "evaluate": "Measure a model, or pictures, beside real images.",
    "ema": "Average a run's weights over any length.",
    "tune": "Fit a solver to a model, for few evaluations.",
    "data": "Report on a data set, before training on it.",
    "convert": "Write a model in another layout.",
    "inspect": "Say what a run, a model, a checkpoint or a picture is.",
    "doctor": "Say what this machine offers, and measure it.",
}


class Group(click.Group):
    """The commands by name, and what becomes of their errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command, its module imported now."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"reverie.cli.{name}").command
        command.name = name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; the nearest is told where there is none."""
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise click.UsageError(f"there is no command {name!r}{nearest(name, COMMANDS)} (known: {known})", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands from the table: none is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command, and end the process with its code."""
        words = list(sys.argv[1:] if args is None else args)
        name, code = prog_name or "reverie", 0
        extra.pop("standalone_mode", None)
        complete(self, name)
        try:
            with heard(signal.SIGTERM), plain_warnings(), self.make_context(name, [*words], **extra) as ctx:
                escape_unprintable()
                self.invoke(ctx)
                sys.stdout.flush()
        except click.exceptions.Exit as error:
            code = error.exit_code
        except SystemExit:
            raise
        except BaseException as error:
            failure = explain(error, self.called(words))
            report(failure, error, "--debug" in words)
            code = failure.code
        drop_unread(sys.stdout)
        sys.exit(code)

    def called(self, words: Sequence[str]) -> click.Command | None:
        """Return the command that was called, if it was ever imported."""
        name = next((word for word in words if word in COMMANDS), "")
        module = sys.modules.get(f"reverie.cli.{name}")
        return getattr(module, "command", None)


def complete(command: click.Command, name: str) -> None:
    """Answer a shell that asks for completions, and end; else do nothing."""
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    if instruction := os.environ.get(variable):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(command, {}, name, variable, instruction))


def escape_unprintable() -> None:
    """Let text that the terminal has no letters for be escaped, rather than end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """A block in which a warning is one line, without the code that it comes from."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        note(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def heard(signum: signal.Signals) -> Iterator[None]:
    """Turn a signal into an error while the block runs, so that files are closed and the code is ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signum, terminated)
    try:
        yield
    finally:
        signal.signal(signum, before)


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value and not ctx.resilient_parsing:
        click.echo(f"reverie {reverie.__version__}")
        ctx.exit()


@click.group(
    "reverie",
    cls=Group,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "max_content_width": 120,
    },
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=show_version, help="Show it.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback with any error.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Diffusion models from the formula to the picture.

    \b
    reverie train --data digits --out runs/digits --minutes 3
    reverie sample runs/digits -n 64 --out digits/
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Run the command line."""
    cli.main()
