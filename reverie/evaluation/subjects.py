"""What is evaluated: a model, which is sampled, or pictures that are there."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from reverie.base.errors import DataError, ModelFileError, UsageError
from reverie.data import open_dataset, sources
from reverie.data.dataset import Dataset
from reverie.data.open import find_source
from reverie.evaluation.spaces import Report, Say, by, shuffled
from reverie.models.formats import recognise
from reverie.models.load import load
from reverie.models.model import Model
from reverie.models.plan import SamplingPlan
from reverie.models.settling import find_class, settle_size

SAMPLES = 1000  # of a model, where nothing is said
MOST = 10_000  # pictures of a folder, where nothing is said
PART = 1000  # samples that are drawn before they become bytes


class Subject(ABC):
    """Where samples come from.

    Attributes:
        model: The model, if it is one.
        count: How many samples there are.
        shape: (C, H, W) of each.
    """

    model: Model | None
    count: int
    shape: tuple[int, ...]

    @abstractmethod
    def samples(self) -> UInt8[Tensor, "n c h w"]:
        """Return the samples (N, C, H, W)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return how they came about, as JSON holds it."""

    def plan_settings(self) -> dict[str, Any] | None:
        """Return all that decides the samples beside the model, as JSON holds it; None for pictures that are there."""
        return None

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return what it is, as JSON holds it."""


class Pictures(Subject):
    """Pictures that are there.

    Arguments:
        dataset: They.
        n: How many of them, drawn at random; all, 10,000 at most, where None.

    Raises:
        UsageError: There are not so many.
    """

    model = None

    def __init__(self, dataset: Dataset, n: int | None) -> None:
        if n is not None and n > len(dataset):
            raise UsageError(f"n is {n}, and {dataset.name} holds {len(dataset)} pictures")
        self.dataset, self.shape = dataset, dataset.shape
        self.count = min(len(dataset), MOST) if n is None else n

    def samples(self) -> UInt8[Tensor, "n c h w"]:
        return self.dataset.images(shuffled(len(self.dataset), "subject")[: self.count])

    def settings(self) -> dict[str, Any]:
        return {"sampler": None, "steps": None, "seed": None, "evaluations": None, "sampling_seconds": None}

    def about(self) -> dict[str, Any]:
        data = self.dataset
        return {"kind": "pictures", "source": data.name, "fingerprint": data.fingerprint, "count": len(data)}


class Sampled(Subject):
    """A model's samples.

    Arguments:
        model: The model.
        n: How many; 1000, where None.
        seed: The first one's, each next being one more.
        request: How, as `Model.plan` takes it.
        say: Told what is drawn.
        report: Told how far it is.
    """

    def __init__(
        self, model: Model, n: int | None, seed: int, request: Mapping[str, Any], say: Say, report: Report
    ) -> None:
        self.model: Model = model
        self.count, self.seed, self.request = SAMPLES if n is None else n, seed, dict(request)
        self.say, self.report, self.seconds = say, report, 0.0
        self.labels: Sequence[int] | None = None
        self.shape = picture_shape(model, self.request.get("size"))

    def plan(self, start: int, stop: int) -> SamplingPlan:
        """Return the plan of some of the samples: of class labels[i mod their number], where there are labels."""
        labels = self.labels
        classes = None if labels is None else [int(labels[i % len(labels)]) for i in range(start, stop)]
        seeds = list(range(self.seed + start, self.seed + stop))
        return self.model.plan(stop - start, seed=seeds, classes=classes, **self.request)

    def samples(self) -> UInt8[Tensor, "n c h w"]:
        """Return the samples, drawn a part at a time: how many they are has nothing to do with a batch."""
        began, parts = time.monotonic(), []
        last = self.seed + self.count - 1
        self.say(f"{self.plan(0, self.count).sentence()}; seed {self.seed} to {last}")
        for start in range(0, self.count, PART):
            plan = self.plan(start, min(start + PART, self.count))
            parts.append(self.model.execute(plan, self.ticking(start, plan)).uint8)
        self.seconds = time.monotonic() - began
        return torch.cat(parts)

    def ticking(self, start: int, plan: SamplingPlan) -> Callable[[Any], None]:
        """Return what tells of the samples that are done, by each step of each batch."""
        return lambda progress: self.report("samples", start + plan.n * progress.done // progress.total, self.count)

    def settings(self) -> dict[str, Any]:
        plan = self.plan(0, 1)
        told = {"sampler": plan.sampler_name, "steps": plan.steps, "guidance": plan.guidance, "seed": self.seed}
        return told | {"evaluations": plan.evaluations, "sampling_seconds": round(self.seconds, 3)}

    def plan_settings(self) -> dict[str, Any] | None:
        return self.plan(0, 1).settings()

    def about(self) -> dict[str, Any]:
        return {"kind": "model", **self.model.identity()}


def picture_shape(model: Model, size: Any = None) -> tuple[int, ...]:
    """Return (C, H, W) of the pictures that a model draws.

    Raises:
        UsageError: It draws none.
    """
    if model.card.kind != "image":
        raise UsageError(f"this is a model of {model.card.kind}; pictures are evaluated here")
    channels = model.codec.channels if model.codec else model.card.shape[0]
    return (channels, *settle_size(model.card, size, model.codec.factor if model.codec else 1))


def drawn_classes(model: Model, against: Dataset, asked: Sequence[int | str] | str | None) -> tuple[str, ...] | None:
    """Return the classes that are drawn: those asked for, all for "all"; None for samples without a class.

    Raises:
        UsageError: There is no such class, or the data has other classes.
    """
    card = model.card
    if asked is None and (not card.classes or card.unconditional):
        return None
    if not card.classes:
        raise UsageError(f"class {asked!r} was asked for, but this model has no classes; leave it out")
    if against.classes != card.classes:
        raise UsageError(
            f"classes are drawn in the real images' shares, and {against.name} has other classes "
            f"({len(against.classes)}) than the model ({len(card.classes)})"
        )
    if asked is None or (asked in ("all", ["all"], ("all",)) and "all" not in card.classes):
        return card.classes
    names = [asked] if isinstance(asked, str) else list(asked)
    return tuple(card.classes[find_class(card, name)] for name in names)


# Opening --------------------------------------------------------------------------------------------


def is_model(path: str) -> bool:
    """Return whether there is a model at a path; else it is a source of pictures, by its name or its content.

    Raises:
        UsageError: There is nothing at that path, and no source has that name.
        DataError: It is a file that is neither.
    """
    try:
        recognise(path)
    except ModelFileError as no_model:
        try:
            find_source(path)
        except DataError:
            raise no_model from None
        return False
    except UsageError as nothing:
        if find_name(path):
            return False
        raise nothing from None
    return True


def find_name(spec: str) -> bool:
    """Return whether a source has the name that stands before a colon.

    Example:
        >>> find_name("shapes:16,count=5"), find_name("photos/")
        (True, False)
    """
    return spec.partition(":")[0] in sources


def open_subject(path: str, **how: Any) -> Model | Dataset:
    """Return the model at a path, or the pictures there.

    Arguments:
        path: Where.
        how: As `load` takes it, where it is a model.

    Raises:
        UsageError: There is nothing at that path, or something is asked for that is of models alone.
        ModelFileError: It is a damaged model, or neither a model nor pictures.
        DataError: The pictures can't be read.
    """
    if is_model(path):
        return load(path, **how)
    if how:
        raise UsageError(f"{', '.join(how)}: of models, and {path} holds pictures; leave it out")
    return open_dataset(path)


def open_against(spec: str, subject: Model | Dataset, size: Any = None) -> Dataset:
    """Return the real images that a subject is compared to, prepared to its size where that is as it was trained.

    A source whose images have another size than the subject's is brought to that size if the subject was trained on
    this very source, or if `size` asks for it, and is else refused.

    Raises:
        UsageError: There is no such source, or its images have another size.
        DataError: It can't be read.
    """
    shape = picture_shape(subject, size) if isinstance(subject, Model) else subject.shape
    data = open_dataset(spec, channels=shape[0])
    if data.shape == shape:
        return data
    known = subject.card.data if isinstance(subject, Model) else None
    if size is None and (known is None or known.fingerprint != data.fingerprint):
        raise UsageError(other_size(shape, data))
    return open_dataset(spec, channels=shape[0], size=(shape[1], shape[2]))


def other_size(shape: Sequence[int], data: Dataset) -> str:
    """Return that samples and real images differ in their size, and what to do."""
    hint = f"bring those to the samples' size by --size {shape[2]}x{shape[1]}, or name another source"
    return f"the samples are {by(shape)}, the images of {data.name} {by(data.shape)}; {hint}"
