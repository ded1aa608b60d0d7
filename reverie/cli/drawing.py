"""From what `reverie sample` was told to files: pictures drawn a batch at a time and written as they come."""

import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reverie.base.errors import ReverieError, Stopped, UsageError
from reverie.cli.console import interactive, note, size
from reverie.cli.options import flag, plain
from reverie.models.footprint import weights_bytes, working_bytes
from reverie.models.guiding import KINDS
from reverie.models.load import load
from reverie.models.model import Model, Samples
from reverie.models.pictures import again, animation, grid_picture, picture_bytes, write_new, write_pictures
from reverie.models.plan import make_plan
from reverie.models.provenance import interpolated
from reverie.models.sampling import Progress, SamplingPlan, memory_needed
from reverie.training.metrics import Console

if TYPE_CHECKING:
    from reverie.cli.edit import EditSettings
    from reverie.cli.evaluate import EvaluateSettings
    from reverie.cli.sample import SampleSettings

SHEET = 144  # pictures on a contact sheet, at most
FRAMES = 40  # of an animation, at most
LARGE = 2**30  # bytes worth a word before they are taken
RECORDED = (
    "sampler",
    "options",
    "recipe",
    "grid",
    "steps",
    "guidance",
    *KINDS,
    "clip",
    "threshold",
    "size",
    "upscale",
    "upscale_strength",
    "dtype",
    "exact",
    "speed",
    "weights",
    "cache_every",
    "batch_size",
)

# What a model is asked beside options of samplers and grids.
CALLS = (make_plan, Model.sample, Model.edit)
OTHERS = {name for call in CALLS for name in signature(call).parameters} - {"options"}
NAMED_ELSE = {"classes": "class_"}

Tick = Callable[[Progress, int], None]


def opened(settings: "SampleSettings | EditSettings | EvaluateSettings", path: str, **how: Any) -> Model:
    """Return the model, with the LoRAs and new words that were asked for."""
    model = load(
        path, device=settings.device, ema=settings.ema, vocabulary=settings.vocabulary, loras=weighed(settings.lora),
        embeddings=settings.embedding, clip_skip=settings.clip_skip, speed=settings.speed,
        weights=settings.weights, **how,
    )  # fmt: skip
    if model.speed.name == "fast":
        note(model.speed.words())
    for line in model.adapted.notes if model.adapted else ():
        note(line)
    return model


def weighed(texts: Sequence[str]) -> dict[str, float]:
    """Return FILE=WEIGHT as files and weights.

    Example:
        >>> weighed(["style.safetensors=0.8", "b.safetensors"])
        {'style.safetensors': 0.8, 'b.safetensors': 1.0}
    """
    found = {}
    for text in texts:
        path, equals, weight = text.rpartition("=")
        try:
            found[path if equals else text] = float(weight) if equals else 1.0
        except ValueError:
            raise UsageError(
                f"--lora is {text!r}; it must be FILE or FILE=WEIGHT, as in style.safetensors=0.8"
            ) from None
    return found


def sample(settings: "SampleSettings", path: str) -> dict[str, Any]:
    """Draw the pictures, write them as they come, and return what was made."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = opened(settings, path, dtype=settings.dtype)
    if model.card.kind != "image":
        raise UsageError(f"{path} is a model of {model.card.kind}, and no pictures come of it; sample it from Python")
    job = Job(model, settings)
    for line in job.words():
        note(line)
    made = job.run()
    for warning in model.warnings:
        note(f"warning: {warning}")
    return made


class Job:
    """The pictures that were asked for: their seeds and classes, drawn a batch at a time.

    Arguments:
        model: The model.
        settings: What was asked for.
    """

    def __init__(self, model: Model, settings: "SampleSettings") -> None:
        self.model, self.settings = model, settings
        self.classes = wanted_classes(model.card.classes, settings)
        self.bad = None if settings.bad is None else model.worse_model(settings.bad)
        first = secrets.randbelow(2**32) if settings.seed in (None, -1) else settings.seed
        assert first is not None
        self.each = settings.n or 16
        self.seeds = range(first, first + self.each * max(1, len(self.classes)))
        self.plan = self.planned(self.seeds)
        self.files: list[Path] = []
        self.kept: list[Samples] = []

    def planned(self, seeds: Sequence[int], intermediates: int = 0) -> SamplingPlan:
        """Return the plan for some of the seeds."""
        return self.model.plan(
            len(seeds), seed=list(seeds), classes=self.classes_of(seeds), intermediates=intermediates,
            upscale=self.settings.upscale, upscale_strength=self.settings.upscale_strength,
            **asked(self.settings, self.bad),
        )  # fmt: skip

    def classes_of(self, seeds: Sequence[int]) -> list[str] | None:
        """Return the class of each of some seeds: so many of the first, then of the second."""
        if not self.classes:
            return None
        return [self.classes[(seed - self.seeds[0]) // self.each] for seed in seeds]

    def words(self) -> Iterator[str]:
        """Yield what will run, before it does."""
        seeds = f"seed {self.seeds[0]}" + (f" to {self.seeds[-1]}" if len(self.seeds) > 1 else "")
        yield f"{self.plan.sentence()}; {seeds}"
        if self.model.card.classes and not self.classes:
            known = self.model.card.classes
            shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
            yield f"drawn without a class; --class takes {shown}, or all"
        for text in (self.settings.prompt, self.settings.negative_prompt):
            yield from self.model.conditioner.remarks(text) if text and self.model.conditioner else ()
        needed = memory_needed(self.planned(self.seeds[: self.plan.batch_size], self.frames))
        needed += working_bytes(self.model.denoiser.network, self.model.codec, self.plan.second or self.plan)
        if needed > LARGE:
            weights = size(weights_bytes(self.model.denoiser.network, self.model.codec))
            yield f"a batch of {self.plan.batch_size} takes about {size(needed)} of memory, beside {weights} of weights"

    @property
    def frames(self) -> int:
        """How many states an animation keeps."""
        return min(FRAMES, self.plan.steps) if self.settings.animate else 0

    def run(self) -> dict[str, Any]:
        """Draw and write, batch after batch; what is written stays if the rest does not come to be."""
        began, total = time.monotonic(), len(self.seeds)
        try:
            with progress_bar(total) as tick:
                for start in range(0, total, self.plan.batch_size):
                    self.draw(self.seeds[start : start + self.plan.batch_size], tick)
        except (KeyboardInterrupt, Stopped) as stop:
            code = stop.exit_code - 128 if isinstance(stop, Stopped) else 2
            raise Stopped(f"stopped; {len(self.files)} of {total} pictures are in {self.settings.out}", code) from stop
        except ReverieError:
            if self.files:
                note(f"{len(self.files)} of {total} pictures were written before, in {self.settings.out}")
            raise
        seconds = time.monotonic() - began
        note(f"{total} picture{'s' * (total != 1)} in {seconds:.1f} s, {total / seconds:.2g} a second")
        return self.summary() | self.overviews() | {"seconds": round(seconds, 3)}

    def draw(self, seeds: Sequence[int], tick: Tick) -> None:
        """Draw and write one batch."""
        plan = self.planned(seeds, 0 if self.files else self.frames)
        samples = self.model.execute(
            plan, lambda progress: tick(progress, plan.steps * (1 if plan.second is None else 2))
        )
        self.files += write_pictures(samples, self.settings.out)
        if sum(map(len, self.kept)) < SHEET:
            self.kept.append(samples)

    def summary(self) -> dict[str, Any]:
        """Return what was made, as JSON holds it."""
        labels = self.plan.labels
        return {
            "model": self.model.source,
            "files": [str(path) for path in self.files],
            "seeds": list(self.seeds),
            "classes": self.model.class_names(labels),
            "prompt": self.settings.prompt,
            "settings": self.plan.settings(),
            "evaluations": self.plan.evaluations,
        }

    def overviews(self) -> dict[str, str | None]:
        """Write the sheet and the animation that are asked for, and return where they are."""
        stem = self.files[0].with_name(self.files[0].name.split("-")[0])
        found: dict[str, str | None] = {"grid_picture": None, "animation": None}
        if self.settings.grid_picture and len(self.files) > 1:
            sheet = picture_bytes(grid_picture(*self.sheet()))
            found["grid_picture"] = str(write_new(Path(f"{stem}-grid.png"), sheet))
        if self.settings.animate:
            path = Path(f"{stem}-denoising.gif")
            found["animation"] = str(animation(self.kept[0].intermediates, path))
        return found

    def sheet(self) -> tuple[Any, int | None, list[str] | None]:
        """Return the pictures of the sheet, its columns (a row for each class), and their labels."""
        images = torch.cat([samples.uint8 for samples in self.kept])[:SHEET]
        labels = [samples.class_of(i) or "" for samples in self.kept for i in range(len(samples))][:SHEET]
        columns = self.each if len(self.classes) > 1 and self.each <= 16 else None
        return images, columns, labels if self.classes else None


def asked(ask: "SampleSettings | EvaluateSettings", bad: Model | None) -> dict[str, Any]:
    """Return what was asked for of a model's samples beside how many, seeds and classes, as `Model.plan` takes it."""
    same = (
        "prompt", "negative_prompt", "sampler", "steps", "guidance", *KINDS[:-1], "clip", "threshold", "batch_size",
        "cache_every",
    )  # fmt: skip
    options = named_options(ask.set_, type(ask).model_fields)
    options |= {name: value for name in ("eta", "variance") if (value := getattr(ask, name)) is not None}
    grid = list(ask.times) if ask.times else ask.grid
    request = {name: getattr(ask, name) for name in same} | {"grid": grid, "bad": bad, "size": sides(ask.size)}
    return request | options


def sides(text: str | None) -> tuple[int, int] | None:
    """Return height and width, of width x height in words.

    Example:
        >>> sides("768x512"), sides("64")
        ((512, 768), (64, 64))
    """
    if text is None:
        return None
    width, _, height = text.partition("x")
    return int(height or width), int(width)


def named_options(texts: Sequence[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """Return NAME=VALUE as names and values: numbers, true and false, words.

    Arguments:
        texts: Those.
        flags: The command's own settings.

    Raises:
        UsageError: One is not NAME=VALUE, or a name is not one of a sampler or a grid, whatever they are.

    Example:
        >>> named_options(["order=2", "rule=exact", "corrector=false"])
        {'order': 2, 'rule': 'exact', 'corrector': False}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise UsageError(f"--set is {text!r}; it must be NAME=VALUE, as in order=2")
        if name in OTHERS:
            own = next((one for one in (name, f"{name}_", NAMED_ELSE.get(name)) if one in flags), None)
            told = f"that is {flag(own)}" if own else "no sampler and no grid has an option of that name"
            raise UsageError(f"--set {text}: {told}")
        found[name] = {"true": True, "false": False}.get(value, plain(value, int | float))
    return found


def wanted_classes(known: Sequence[str], settings: "SampleSettings") -> list[str]:
    """Return the classes asked for; "all" is all of them, where none has that name.

    Example:
        >>> from reverie.cli.sample import SampleSettings
        >>> wanted_classes(("cat", "dog"), SampleSettings(class_=("all",)))
        ['cat', 'dog']
    """
    asked = settings.class_
    if asked and not known:
        raise UsageError(f"--class is {','.join(asked)}, but this model has no classes; leave it out")
    if "all" not in asked or "all" in known:
        return list(asked)
    if len(asked) > 1:
        raise UsageError(f"--class is {','.join(asked)}; all stands alone")
    return list(known)


@contextmanager
def progress_bar(total: int) -> Iterator[Tick]:
    """A bar of pictures, their rate and the time left on standard error, moved by each step of each batch."""
    shape = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} pictures, {elapsed}<{remaining}, {rate_noinv_fmt}"
    every = 0.2 if interactive() else 30.0  # a log file needs no more
    # The delay keeps a bar from view where nothing comes to be drawn.
    options = {"mininterval": every, "unit": " pictures", "delay": 1e-3}
    with tqdm(total=total, file=Console(sys.stderr), bar_format=shape, **options) as bar:
        yield lambda progress, steps: bar.update(len(progress.state.x) / steps)


# Editing --------------------------------------------------------------------------------------


def edit(settings: "EditSettings", path: str, image: str) -> dict[str, Any]:
    """Draw a picture anew, write what comes of it, and return what was made."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = opened(settings, path)
    if settings.with_ is not None and settings.task != "interpolate":
        raise UsageError("--with has no effect but on --task interpolate; leave it out")
    first = secrets.randbelow(2**32) if settings.seed in (None, -1) else settings.seed
    how = {
        name: getattr(settings, name)
        for name in ("prompt", "negative_prompt", "sampler", "steps", "grid", "guidance", "cache_every")
    }
    how |= {"classes": settings.class_} | named_options(settings.set_, type(settings).model_fields)
    with progress_bar(settings.n) as tick:
        how["callback"] = lambda progress: tick(progress, progress.total)
        if settings.task == "interpolate":
            samples = between(settings, model, image, how)
        else:
            here = {name: getattr(settings, name) for name in ("mask", "strength", "task", "factor")}
            here["outpaint"] = given_sides(settings.outpaint)
            samples = model.edit(image, settings.n, seed=first, **here, **how)
    for warning in model.warnings:
        note(f"warning: {warning}")
    files = write_pictures(samples, settings.out)
    record = samples.record
    note(edited(record))
    return {
        "model": model.source,
        "files": [str(file) for file in files],
        "seeds": samples.seeds.tolist(),
        "prompt": settings.prompt,
        "edit": record["edit"],
        "between": record["between"],
        "settings": {name: record[name] for name in (*RECORDED, "strength")},
    }


def edited(record: Mapping[str, Any]) -> str:
    """Return what was run for an edit, in words.

    Example:
        >>> edited({"sampler": "ddim", "grid": "trailing", "steps": 20, "strength": 0.8})
        '20 steps of ddim from t = 0.8, grid trailing'
    """
    if record["strength"] is not None and record["strength"] < 1e-6:
        return "strength 0 leaves the picture as it is: no step was run"
    grid = record["grid"] if isinstance(record["grid"], str) else "of its own"
    return f"{record['steps']} steps of {record['sampler']} from t = {record['strength'] or 1:g}, grid {grid}"


def between(settings: "EditSettings", model: Model, image: str, how: dict[str, Any]) -> Samples:
    """Return samples on the way from one picture to another, both of the model's own.

    Raises:
        UsageError: The other is not said, or something that has no effect is.
    """
    if settings.with_ is None:
        raise UsageError("--task interpolate goes from one picture to another; name that with --with")
    for name in ("mask", "outpaint", "strength", "factor", "seed"):
        if getattr(settings, name) is not None:
            raise UsageError(f"--{name} has no effect on --task interpolate; leave it out")
    return interpolated(model, image, settings.with_, settings.n, **how)


def given_sides(sides: tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    """Return what `Model.edit` takes: one number alone as such."""
    return sides[0] if sides is not None and len(sides) == 1 else sides


# Making again ---------------------------------------------------------------------------------


def repeat(settings: "SampleSettings", path: str | None) -> dict[str, Any]:
    """Make a picture again by its own record, and return what was made and whether it is the same."""
    original = Path(str(settings.again))
    device = settings.device if "device" in settings.model_fields_set else None
    with progress_bar(1) as tick:
        samples = again(original, path, device=device, callback=lambda progress: tick(progress, progress.total))
    files = write_pictures(samples, settings.out)
    off = difference(original, samples)
    note(
        f"the same picture as {original}, to the last bit" if off == 0 else f"differs from {original}, by {words(off)}"
    )
    return {
        "model": samples.record["model"]["source"],
        "files": [str(file) for file in files],
        "seeds": samples.seeds.tolist(),
        "classes": samples.record["classes"],
        "prompt": (samples.record["prompts"] or [None])[0],
        "settings": {name: samples.record[name] for name in RECORDED},
        "again": str(original),
        "difference": off,
    }


def words(off: int | None) -> str:
    """Return a difference in words."""
    return "its size" if off is None else f"{off} of 255 at most"


def difference(path: Path, samples: Samples) -> int | None:
    """Return by how much a picture's values differ from its repetition's at most; None: their sizes do."""
    new = samples.pil()[0]
    with Image.open(path, formats=("PNG",)) as old:
        if (old.size, old.mode) != (new.size, new.mode):
            return None
        return int(np.abs(np.asarray(old, np.int16) - np.asarray(new, np.int16)).max())
