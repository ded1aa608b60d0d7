"""What a run says of itself: metrics.jsonl, always; TensorBoard and Weights & Biases where asked for.

One JSON object a line, with its step, flushed as it is written. JSON has no NaN and no infinity: they are written as
the strings "NaN", "Infinity" and "-Infinity", which Python's float() and JavaScript's Number() read back (null would
not tell them apart). A resumed run first drops the lines from its step on, so that no step is there twice.

Nothing here ends a training: a full disk, a closed terminal or a tracker that fails costs one warning.

References:
    JSON Lines, the format
    https://jsonlines.org
"""

import importlib
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.registry import Registry
from reverie.base.storage import guarded, put, storage_error, write_file

# Saying something -----------------------------------------------------------------------------


def warn(message: str) -> None:
    """Say a warning on standard error, if anyone listens there."""
    with suppress(OSError, ValueError, AttributeError):  # closed; or there is none
        print(f"warning: {message}", file=sys.stderr, flush=True)


@runtime_checkable
class Stream(Protocol):
    """An open text file, as far as a console needs one."""

    def write(self, text: str, /) -> int:
        """Take text."""

    def flush(self) -> None:
        """Send what was taken."""

    def isatty(self) -> bool:
        """Return whether it is a terminal."""

    def fileno(self) -> int:
        """Return its number with the system."""


class Console:
    """A text stream that may close at any time: `reverie train | head -1`, a terminal that is gone, a full disk.

    Arguments:
        stream: Where to write, such as standard output.
        warn: Called once, when the stream fails; after that everything is dropped.

    Example:
        >>> console = Console(sys.stdout)
        >>> console.say("step 100, loss 0.043")
        step 100, loss 0.043
    """

    def __init__(self, stream: Stream, warn: Callable[[str], None] = warn) -> None:
        self.stream = stream
        self.warn = warn
        self.open = True

    def say(self, line: str) -> None:
        """Write a line, now."""
        self.write(line + "\n")
        self.flush()

    def write(self, text: str) -> int:
        """Write text; with `flush` and `isatty`, all that a progress bar needs of a file."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Send what was written."""
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        """Return whether a person looks at it."""
        return self.open and self.stream.isatty()

    def _try(self, act: Callable[[], Any]) -> None:
        if not self.open:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: closed in this process
            self.open = False
            self._silence()
            self.warn(f"output is closed ({error}); the run goes on without it")

    def _silence(self) -> None:
        """Point the stream at nothing: Python flushes it once more at its end, and would fail then."""
        with suppress(OSError, ValueError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self.stream.fileno())
            os.close(handle)


# The log --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value as JSON holds it.

    Example:
        >>> plain({"loss": float("nan"), "lr": 1e-4, "grid": (8, 8)})
        {'loss': 'NaN', 'lr': 0.0001, 'grid': [8, 8]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # tensors and arrays, of one number too
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class MetricsLog:
    """A file of one JSON object a line.

    Arguments:
        path: The file, such as runs/digits/metrics.jsonl.
        resume_at: The step at which the run goes on: lines of that step and later ones are dropped, and so are
            broken lines. None is a new run, and there must be no lines.
        trackers: Told the same numbers, and closed with the log.
        warn: Called once, when a line cannot be written. Later lines are tried anew, and a broken line is cut off.

    Raises:
        UsageError: A new run, and the file has lines.
        StorageError: The file cannot be opened or rewritten.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, MetricsLog(Path(folder) / "metrics.jsonl") as log:
        ...     log.write(100, {"loss": 0.5, "norm": float("inf")})
        ...     print(log.path.read_text(), end="")
        {"step": 100, "loss": 0.5, "norm": "Infinity"}
    """

    def __init__(
        self,
        path: Path | str,
        resume_at: int | None = None,
        trackers: "Trackers | None" = None,
        warn: Callable[[str], None] = warn,
    ) -> None:
        self.path = Path(path)
        self.trackers = trackers or Trackers({})
        self.warn = warn
        self._warned = False
        with guarded(self.path):
            if self.path.exists() and self.path.stat().st_size:
                if resume_at is None:
                    raise UsageError(f"{self.path} is the log of a run; go on with --resume, or choose another folder")
                self._drop_from(resume_at)
            self._file: BinaryIO = self.path.open("ab", buffering=0)
            self._end = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line; if the disk refuses, warn once and go on.

        Arguments:
            step: How many steps came before.
            values: Numbers by name; tensors and arrays become numbers and lists.
        """
        line = json.dumps({"step": step, **plain(values)}, allow_nan=False).encode() + b"\n"
        try:
            if os.fstat(self._file.fileno()).st_size != self._end:  # a part of a line that failed
                self._file.truncate(self._end)
            put(self._file, line)
            self._end += len(line)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.warn(f"{storage_error(error, self.path, len(line))}; until then lines of the log are lost")
        self.trackers.log(step, values)

    def close(self) -> None:
        """Close the file and the trackers."""
        with suppress(OSError):
            self._file.close()
        self.trackers.close()

    def _drop_from(self, step: int) -> None:
        """Keep the lines before a step, byte for byte."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and -1 < step_of(line) < step]
        if kept != lines:
            write_file(self.path, b"".join(kept))


def step_of(line: bytes) -> int:
    """Return a line's step, or -1 where the line is broken: killed in the middle of a write.

    Example:
        >>> step_of(b'{"step": 100, "loss": 0.5}'), step_of(b'{"step": 100, "lo')
        (100, -1)
    """
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return step if type(step) is int else -1


# Trackers -------------------------------------------------------------------------------------


@runtime_checkable
class Tracker(Protocol):
    """Anything that shows numbers and pictures along a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers."""

    def picture(self, step: int, name: str, image: UInt8[Tensor, "c h w"]) -> None:
        """Show an image."""

    def close(self) -> None:
        """Write what is left."""


def imported(package: str) -> Any:
    """Return an optional package.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f'{package} is not installed ({error}); pip install "reverie[tracking]"') from error


class TensorBoard:
    """Event files that `tensorboard --logdir` shows.

    Arguments:
        folder: The run's folder; events go into its `tensorboard`.
        config: The run's configuration, shown as text.
        resume_at: The step at which the run goes on: what an earlier life logged from there on is hidden.

    References:
        torch.utils.tensorboard
        https://docs.pytorch.org/docs/stable/tensorboard.html
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None = None) -> None:
        imported("tensorboard")
        writer = imported("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=resume_at)
        self._writer.add_text("config", f"```json\n{json.dumps(plain(config), indent=1)}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: UInt8[Tensor, "c h w"]) -> None:
        """Show an image."""
        self._writer.add_image(name, image, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline where WANDB_MODE=offline says so.

    Its number is kept in the run's folder, so that a resumed run goes on in the same curve. W&B drops steps that it
    has seen, which after a resume are the same numbers again.

    Arguments:
        folder: The run's folder.
        config: The run's configuration.
        resume_at: As for the others; W&B needs only its own number.

    Raises:
        UsageError: wandb is not installed, or refuses to start.

    References:
        wandb.init
        https://docs.wandb.ai/ref/python/init/
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None = None) -> None:
        wandb = imported("wandb")
        number = folder / "wandb-id.txt"
        if not number.exists():
            write_file(number, os.urandom(8).hex().encode())
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project="reverie",
                name=folder.resolve().name,
                dir=str(folder),
                config=plain(config),
                id=number.read_text(),
                resume="allow",
            )
        except Exception as error:  # its own kinds, of which there are many
            cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UsageError(f"wandb: {cause[0]}; run `wandb login`, or set WANDB_MODE=offline") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: UInt8[Tensor, "c h w"]) -> None:
        """Show an image."""
        self._run.log({name: self._image(image.permute(1, 2, 0).cpu().numpy())}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


trackers = Registry(
    "tracker",
    {
        "tensorboard": "reverie.training.metrics:TensorBoard",
        "wandb": "reverie.training.metrics:WeightsAndBiases",
    },
)


class Trackers:
    """Trackers that are told the same; one that fails is dropped, with a warning.

    Arguments:
        members: Trackers by name.
        warn: Called once for each that fails.
    """

    def __init__(self, members: Mapping[str, Tracker], warn: Callable[[str], None] = warn) -> None:
        self.members = dict(members)
        self.warn = warn

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers among the values; NaN and infinity are shown as such."""
        shown = {name: float(value) for name, value in values.items() if is_number(value)}
        self._each(lambda tracker: tracker.log(step, shown))

    def picture(self, step: int, name: str, image: UInt8[Tensor, "c h w"]) -> None:
        """Show an image."""
        self._each(lambda tracker: tracker.picture(step, name, image))

    def close(self) -> None:
        """Write what is left."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.members.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever it is, a curve is not worth a run
                del self.members[name]
                self.warn(f"{name} failed ({type(error).__name__}: {error}); the run goes on without it")


def is_number(value: Any) -> bool:
    """Return whether a value is one number: 0.5, or a tensor that holds one.

    Example:
        >>> is_number(3), is_number("NaN"), is_number(True)
        (True, False, False)
    """
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def open_trackers(
    names: Sequence[str],
    folder: Path | str,
    config: Mapping[str, Any],
    resume_at: int | None = None,
    warn: Callable[[str], None] = warn,
) -> Trackers:
    """Return the trackers asked for, open.

    Arguments:
        names: Of `trackers`: "tensorboard", "wandb".
        folder: The run's folder.
        config: The run's configuration, shown beside the curves.
        resume_at: The step at which the run goes on, None for a new one.
        warn: Called once for each tracker that fails later.

    Raises:
        UsageError: An unknown name, or a package that is not installed; nothing was written.
    """
    kinds = {name: trackers[name] for name in names}
    for name in kinds:
        imported(name)
    opened = Trackers({}, warn)
    try:
        for name, kind in kinds.items():
            opened.members[name] = kind(Path(folder), config, resume_at)
    except BaseException:
        opened.close()
        raise
    return opened
