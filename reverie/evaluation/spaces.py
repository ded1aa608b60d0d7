r"""Feature spaces by name: what two sets of pictures are compared in.

A distance means nothing without its space, so each has a fingerprint, which is printed beside every figure: figures of
one fingerprint can be compared, others can't.

    pixels      grey levels in [-1, 1], each side averaged down to 16 where it is longer;
    classifier  the penultimate layer of a small classifier of the data's own classes (features.py), trained at
                first use on labelled images that are not among those compared, and kept in a cache; scaled, so
                that the mean variance of its 64 features is 1 on those images.

References:
    On Aliased Resizing and Surprising Subtleties in GAN Evaluation (Parmar et al., 2022): why to say how it was resized
    https://arxiv.org/abs/2104.11222
"""

import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from reverie.base.errors import ModelFileError, StorageError, UsageError
from reverie.base.randomness import generator
from reverie.base.registry import Registry
from reverie.data.dataset import Dataset
from reverie.evaluation.features import FORMAT, SmallClassifier, train_classifier
from reverie.models.model import weights_digest

SIDE = 16  # of a picture in the space of pixels
UPDATES = 1500  # of the classifier's weights, at the least
PASSES = 3  # over its images, at the least
MOST = 60_000  # images that it is trained on
BYTES = 1 << 30  # of them in memory
SCALED = 5000  # images that its features' scale is told by, at most
JUDGED = 2000  # images that its accuracy is told of, at most

Say = Callable[[str], None]
Report = Callable[[str, int, int], None]  # (stage, done, of how many)


@runtime_checkable
class Space(Protocol):
    """A feature space.

    Attributes:
        name: Its name.
        fingerprint: What figures of this very space have in common, and those of no other.
        about: What it is, as JSON holds it.
    """

    name: str
    fingerprint: str
    about: dict[str, Any]

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Return the features (N, D) of images (N, C, H, W)."""


class Pixels:
    """The grey levels themselves, in [-1, 1]; sides longer than 16 are averaged down to 16 by area.

    Arguments:
        shape: (C, H, W) of the images.

    Example:
        >>> space = Pixels((1, 28, 28))
        >>> space.fingerprint, tuple(space(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape)
        ('pixels-1x16x16-of-1x28x28', (2, 256))
    """

    name = "pixels"

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.side = (min(SIDE, self.shape[1]), min(SIDE, self.shape[2]))
        made = (self.shape[0], *self.side)
        reduced = "" if made == self.shape else "-of-" + "x".join(map(str, self.shape))
        self.fingerprint = "pixels-" + "x".join(map(str, made)) + reduced
        how = f"grey levels in [-1, 1], averaged by area to {self.side[0]}x{self.side[1]}" if reduced else "grey levels"
        self.about: dict[str, Any] = {"dimensions": made[0] * made[1] * made[2], "how": how}

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Return the features (N, D) of images (N, C, H, W)."""
        parts = [functional.adaptive_avg_pool2d(part / 127.5 - 1, self.side).flatten(1) for part in images.split(500)]
        return torch.cat(parts)


class ClassifierSpace:
    """The penultimate layer of a small classifier, in units in which its features' variance is 1 on average.

    Arguments:
        classifier: It; `about["scale"]` is the root of that variance over what it was trained on.
        accuracy: The share of other images whose class it knows.
    """

    name = "classifier"

    def __init__(self, classifier: SmallClassifier, accuracy: float) -> None:
        self.classifier = classifier
        self.fingerprint = f"classifier-{weights_digest(classifier.state_dict())[:16]}"
        self.about = {"dimensions": 64, "accuracy": round(accuracy, 4), **classifier.about}

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 64"]:
        """Return the features (N, 64) of images (N, C, H, W)."""
        return self.classifier.features(images) / float(self.classifier.about["scale"])


# Making one -----------------------------------------------------------------------------------------


def pixel_space(shape: Sequence[int], **unused: Any) -> Pixels:
    """Return the space of pixels."""
    return Pixels(shape)


def classifier_space(
    shape: Sequence[int], labelled: Dataset, rows: Sequence[int], judged: Sequence[int], say: Say, report: Report
) -> ClassifierSpace:
    """Return the space of a classifier, trained now or read from the cache.

    Arguments:
        shape: (C, H, W) of the images that are compared.
        labelled: Images with classes.
        rows: Which of them it is trained on.
        judged: Which others its accuracy is told of.
        say: Told what it does.
        report: Told how far it is.

    Raises:
        UsageError: The images have no classes, or another shape.
    """
    if len(labelled.classes) < 2:
        raise UsageError(
            f"features classifier needs images with classes, and {labelled.name} has {len(labelled.classes)}; "
            "name another source by --features-from, or take --features pixels"
        )
    if labelled.shape != tuple(shape):
        raise UsageError(f"the classifier's images are {by(labelled.shape)}, those compared {by(shape)}")
    rows = list(rows)[: min(MOST, BYTES // max(1, torch.Size(shape).numel()))]
    epochs = max(PASSES, -(-UPDATES * 128 // len(rows)))
    about = {"data": labelled.name, "data_fingerprint": labelled.fingerprint, "images": str(len(rows))}
    key = sha256(repr((FORMAT, "scaled", labelled.fingerprint, shape, rows, epochs)).encode()).hexdigest()
    path = cache_folder() / f"classifier-{key[:32]}.safetensors"
    classifier = cached(path, say)
    if classifier is None:
        say(f"features: training a classifier on {len(rows)} images of {labelled.name}; kept in {path}")
        labels = labelled.labels(rows)
        assert labels is not None
        classifier = train_classifier(
            labelled.images(rows), labels, epochs=epochs, about=about,
            progress=lambda step, steps, loss: report("classifier", step, steps),
        )  # fmt: skip
        spread = classifier.features(labelled.images(rows[:SCALED])).double().var(0).mean().sqrt()
        classifier.about["scale"] = f"{float(spread):.6g}"
        keep(classifier, path, say)
    judged = list(judged)[:JUDGED]
    labels = labelled.labels(judged)
    assert labels is not None
    return ClassifierSpace(classifier, classifier.accuracy(labelled.images(judged), labels))


def cached(path: Path, say: Say) -> SmallClassifier | None:
    """Return the classifier in a file of the cache; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        found = SmallClassifier.load(path)
    except ModelFileError as error:
        say(f"warning: {error}")
        return None
    say(f"features: the classifier in {path}")
    return found


def keep(classifier: SmallClassifier, path: Path, say: Say) -> None:
    """Write a classifier into the cache; where that can't be, say so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        classifier.save(path)
    except (OSError, StorageError) as error:
        say(f"warning: {error}; it will be trained anew the next time")


def cache_folder() -> Path:
    """Return where classifiers are kept: reverie/features in $XDG_CACHE_HOME, ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "reverie" / "features"


def shuffled(count: int, purpose: str) -> list[int]:
    """Return all indices in an order that is fixed by their number and the purpose."""
    return generator(0, purpose).permutation(count).tolist()


def by(shape: Sequence[int]) -> str:
    """Return a shape (C, H, W) for reading.

    Example:
        >>> by((3, 32, 48))
        '48x32 (3 channels)'
    """
    channels, height, width = shape
    return f"{width}x{height} ({channels} channel{'s' * (channels > 1)})"


spaces = Registry(
    "feature space",
    {
        "pixels": f"{__name__}:pixel_space",
        "classifier": f"{__name__}:classifier_space",
    },
)
