"""A run: the loop that every training shares, from a folder that is taken to one that holds a result.

Step after step until the steps, the minutes or a signal end it; a line of the log, a checkpoint, a loss on held-out
data and a picture every so often. What a step does is the subclass's. Everything random is a function of the seed and
of where in the run it is, so that a run that was killed and resumed is the run that was not.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL.Image import Image
from tqdm import tqdm

from reverie.base.errors import NonFiniteError, Stopped, StorageError, UsageError
from reverie.base.lock import RunLock
from reverie.base.storage import write_file
from reverie.data.batches import Batch, Batches
from reverie.kernels.memory import keep_freed_memory
from reverie.models.checkpoints import Checkpoint, CheckpointStore
from reverie.training.metrics import Console, MetricsLog, Stream, open_trackers
from reverie.training.previews import png_bytes, preview_path, to_tensor
from reverie.training.profiling import Profile
from reverie.training.run_config import RunConfig
from reverie.training.signals import StopRequest
from reverie.training.update import StepReport

Resume = Literal["no", "yes", "auto"]
Config = TypeVar("Config", bound=RunConfig)


def check_folder(folder: Path, found: bool, resume: Resume) -> None:
    """Refuse a folder that does not hold what is asked for: a run to resume, or none."""
    if resume == "yes" and not found:
        raise UsageError(f"there is no run to resume in {folder} (no config.json); leave out --resume to start one")
    if found and resume == "no":
        with RunLock(folder):  # says so, if it is running
            raise UsageError(f"{folder} holds a run already; continue it with --resume, or choose another --out")
    if not found and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty and holds no run; choose another --out")


def carry_out(
    kind: Callable[[Config, bool, Console], "BaseRun"], config: Config, resume: Resume, stream: Stream
) -> Path:
    """Begin a run or go on with one, to its end, and return its folder.

    Arguments:
        kind: What makes the run, of its configuration, whether its folder holds it already, and the console.
        config: What to do.
        resume: "no" starts a run, "yes" continues one, "auto" does whichever fits.
        stream: Where its report goes.

    Raises:
        UsageError: The folder does not hold what is asked for.
    """
    folder = Path(config.out)
    found = (folder / "config.json").exists()
    check_folder(folder, found, resume)
    with torch_threads(config.threads):
        return kind(config, found, Console(stream)).go()


class torch_threads:  # noqa: N801 - a context manager
    """A block in which torch computes with so many threads, or with its own number for None."""

    def __init__(self, count: int | None) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        if self.count is not None:
            torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


@dataclass
class Progress:
    """Where a run is, as its checkpoints record it.

    Arguments:
        step: Steps made, the skipped ones among them.
        updates: Steps that changed the weights.
        bad_in_a_row: Steps skipped since the last that was not.
        seconds: Time spent, over all its sessions.
        loss_sum: The losses since the last line of the log.
        loss_count: How many they are.
    """

    step: int = 0
    updates: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0


class BaseRun(ABC):
    """What every run has: its folder, its progress, the loop.

    A subclass makes `store` and `batches`, and says what the abstract methods ask for.

    Arguments:
        config: What to do.
        resumed: Whether its folder holds it already.
        console: Where its report and its progress bar go.
    """

    command: ClassVar[str] = "train"  # of the command line, that goes on with it
    config: RunConfig
    store: CheckpointStore
    batches: Batches
    log: MetricsLog

    def __init__(self, config: RunConfig, resumed: bool, console: Console) -> None:
        self.folder, self.console, self.resumed = Path(config.out), console, resumed
        self.config = config
        self.progress = Progress()
        self.saved_at = -1
        self.stop = StopRequest()

    def say(self, line: str) -> None:
        """Report a line, above the progress bar."""
        tqdm.write(line, file=self.console)

    # What a run is --------------------------------------------------------------------------------

    @abstractmethod
    def lines(self) -> list[str]:
        """Return what will be done in words, a line each."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""

    @abstractmethod
    def write_beginnings(self) -> None:
        """Write what the run is, before its first step."""

    @abstractmethod
    def trained(self, batch: Batch) -> StepReport:
        """Train on a batch, unless that is skipped."""

    @abstractmethod
    def follow(self, updates: int) -> None:
        """Let the averages follow a step that so many updates came before."""

    @abstractmethod
    def validate(self) -> None:
        """Write a loss on held-out data."""

    @abstractmethod
    def pictured(self) -> Image:
        """Return a picture of where the run is."""

    @abstractmethod
    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return the run's state: tensors by group, and a record of everything else."""

    @abstractmethod
    def check_same_run(self) -> None:
        """Refuse a run whose model or data has changed since."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint's state."""

    @abstractmethod
    def finish(self) -> None:
        """Write the last checkpoint, loss and samples, and the result."""

    def also(self, step: int) -> None:  # noqa: B027 - most runs have nothing else
        """Do what else is due after so many steps."""

    # From start to end ----------------------------------------------------------------------------

    def go(self) -> Path:
        """Take the folder, restore, train, and write the model."""
        self.store.prepare()
        keep_freed_memory()
        with RunLock(self.folder), self.stop:
            self.restore() if self.resumed else self.write_beginnings()
            for line in self.lines():
                self.say(line)
            with self.open_log() as self.log:
                self.loop()
                self.finish()
        return self.folder

    def open_log(self) -> MetricsLog:
        """Return the run's log, with the trackers asked for."""
        resume_at = self.progress.step + 1 if self.resumed else None
        told = self.config.model_dump(mode="json")
        trackers = open_trackers(self.config.track, self.folder, told, resume_at, warn=self.say)
        return MetricsLog(self.folder / "metrics.jsonl", resume_at, trackers, warn=self.say)

    def loop(self) -> None:
        """Step until the steps, the minutes or a signal end it."""
        progress = self.progress
        began = time.monotonic() - progress.seconds
        stream = self.batches.stream(progress.step)
        bar, profile = self.open_bar(), Profile(self.config.profile, self.say)
        try:
            while not self.finished() and not self.stop:
                report = profile(lambda: self.step(next(stream)))
                progress.seconds = time.monotonic() - began
                self.note(report, bar)
                self.milestones()
                while self.stop.notes:
                    self.say(self.stop.notes.pop(0))
                progress.seconds = time.monotonic() - began
        finally:
            stream.close()
            bar.close()
        if self.stop.signum is not None:
            self.save(last=True)
            command = f"reverie {self.command} --out {self.folder} --resume"
            raise Stopped(
                f"stopped; saved step {progress.step} of {self.folder}, go on with: {command}", self.stop.signum
            )

    def open_bar(self) -> tqdm:
        """Return the progress bar; where nobody watches, a line every half minute."""
        often = 0.1 if self.console.isatty() else 30.0
        return tqdm(
            total=self.config.total_steps, initial=self.progress.step, unit="step", desc=self.folder.name,
            file=self.console, mininterval=often, maxinterval=max(often, 10.0),
        )  # fmt: skip

    def finished(self) -> bool:
        """Whether the steps or the minutes are over."""
        total, minutes = self.config.total_steps, self.config.minutes
        steps_over = total is not None and self.progress.step >= total
        return steps_over or (minutes is not None and self.progress.seconds >= 60 * minutes)

    # One step -------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepReport:
        """Make one step, and let the averages follow unless it was skipped."""
        progress = self.progress
        report = self.trained(batch)
        progress.step += 1
        if report.skipped:
            progress.bad_in_a_row += 1
            self.report_skipped(report, batch)
            return report
        progress.bad_in_a_row = 0
        self.follow(progress.updates)
        progress.updates += 1
        return report

    def report_skipped(self, report: StepReport, batch: Batch) -> None:
        """Say which step was skipped and why; end the run where too many in a row were."""
        progress, config = self.progress, self.config
        shown = ", ".join(str(i) for i in batch.indices.tolist()[:8])
        numbers = f"loss {report.loss:.4g}, gradient {report.norm:.4g}, images {shown}"
        where = f"step {progress.step}: {report.skipped} ({numbers})"
        if progress.bad_in_a_row < config.max_bad_steps:
            self.say(f"{where}; skipped")
            return
        with suppress(NonFiniteError):  # the weights, which no skipped step has touched
            self.save()
        raise NonFiniteError(
            f"{where}; {progress.bad_in_a_row} steps in a row were skipped and the run ends; its last good state is "
            f"step {max(self.saved_at, 0)} in {self.folder}; lower --learning-rate, or look at these images"
        )

    # What happens every so often ------------------------------------------------------------------

    def note(self, report: StepReport, bar: tqdm) -> None:
        """Show a step, and write a line of the log every so often."""
        progress = self.progress
        if not report.skipped:
            progress.loss_sum += report.loss
            progress.loss_count += 1
        bar.set_postfix(self.shown(report, bar), refresh=False)
        bar.update()
        if progress.step % self.config.log_every == 0 and progress.loss_count:
            values = {
                "loss": progress.loss_sum / progress.loss_count,
                **report.parts,
                "gradient_norm": report.norm,
                "learning_rate": self.rate(progress.step - 1),
                "images": progress.step * self.config.batch_size,
                "skipped": progress.step - progress.updates,
                "seconds": round(progress.seconds, 3),
            }
            self.log.write(progress.step, values)
            progress.loss_sum, progress.loss_count = 0.0, 0

    def shown(self, report: StepReport, bar: tqdm) -> dict[str, str]:
        """Return what stands behind the progress bar: the loss, the speed, and the minutes left where they decide."""
        shown = {"loss": f"{report.loss:.4f}"}
        if rate := bar.format_dict["rate"]:  # not known at first
            shown["images/s"] = f"{self.config.batch_size * rate:.0f}"
        if self.config.minutes is not None:
            shown["minutes left"] = f"{max(0.0, self.config.minutes - self.progress.seconds / 60):.1f}"
        return shown

    def milestones(self) -> None:
        """Save, validate and sample where it is time, unless the run is about to end and will do so anyway."""
        step, config = self.progress.step, self.config
        if self.finished() or self.stop:
            return
        self.also(step)
        if config.validate_every and step % config.validate_every == 0:
            self.validate()
        if config.sample_every and step % config.sample_every == 0:
            self.sample()
        if step % config.save_every == 0:  # last: what a resumed run does not do again is done
            self.save()

    def sample(self) -> None:
        """Write a picture of where the run is."""
        path = preview_path(self.folder, self.progress.step)
        if not self.config.sample_every:
            return
        try:
            picture = self.pictured()
            path.parent.mkdir(exist_ok=True)
            write_file(path, png_bytes(picture))
            self.log.trackers.picture(self.progress.step, "samples", to_tensor(picture))
        except (NonFiniteError, OSError) as error:
            self.say(f"no samples at step {self.progress.step}: {error}")

    # Checkpoints ----------------------------------------------------------------------------------

    def save(self, last: bool = False) -> None:
        """Save a checkpoint; one that fails is reported and tried again at the next, unless it is the last."""
        progress = self.progress
        try:
            with self.stop.saving():
                saved = self.store.save(progress.step, *self.state())
        except StorageError as error:
            if last:
                raise
            self.say(f"step {progress.step} was not saved: {error}; training goes on, the next try is at the next save")
            return
        self.saved_at = progress.step
        for warning in saved.warnings:
            self.say(warning)

    def restore(self) -> None:
        """Go on from the newest checkpoint that verifies, or from the start if the run never saved one.

        Raises:
            ModelFileError: There are checkpoints and none can be used, or what they hold is another model or
                another data set.
        """
        self.check_same_run()
        checkpoint = self.store.latest()
        if checkpoint is None:
            self.say(f"{self.folder} was stopped before its first checkpoint; it begins again at step 0")
            return
        for line in (*checkpoint.warnings, *checkpoint.changes()):
            self.say(line)
        self.load(checkpoint)
        self.saved_at = checkpoint.step
        self.say(f"resuming {self.folder} at step {checkpoint.step}")
