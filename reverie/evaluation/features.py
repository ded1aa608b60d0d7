r"""A feature space of one's own: a small classifier, trained on the data at hand in a minute.

Inception's features, learned on photographs of a thousand classes, say little about digits. A classifier
of the data's own classes must tell apart what people tell apart, and its penultimate layer,

    image (B, C, H, W) -> embedding (B, 64) -> logits (B, classes),                                 (1)

is a space in which the Frechet distance between generated and real images means something, with a floor:
that of real images which were held out. Distances depend on the classifier: compare only those of one
classifier, and say which it was (`about`).

References:
    A Note on the Evaluation of Generative Models (Theis et al., 2016)
    https://arxiv.org/abs/1511.01844

    Super-Convergence (Smith & Topin, 2018): the learning rate's one cycle
    https://arxiv.org/abs/1708.07120
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.base.errors import ModelFileError, NonFiniteError, StorageError, UsageError
from reverie.base.randomness import generator, torch_seed

Images = UInt8[Tensor, "n c h w"]
Labels = Int[Tensor, " m"]

DIMENSIONS = 64
FORMAT = "reverie small classifier 1"


class SmallClassifier(nn.Module):
    """A small convolutional classifier with a 64-dimensional penultimate layer.

    Arguments:
        channels: Channels C of the images.
        classes: Number of classes.
        about: What it was trained on and how, kept in its file: {"data": "mnist", "seed": "0"}.

    Example:
        >>> classifier = SmallClassifier(channels=1, classes=10)
        >>> tuple(classifier.features(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape)
        (3, 64)
    """

    def __init__(self, channels: int, classes: int, about: dict[str, str] | None = None) -> None:
        super().__init__()
        self.channels, self.classes, self.about = channels, classes, dict(about or {})
        self.body = nn.Sequential(
            *_convolution(channels, 24, size=5, stride=2),
            *_convolution(24, 48, size=3, stride=2),
            *_convolution(48, 64, size=3, stride=1),
            nn.AdaptiveAvgPool2d(4),  # any image size ends in the same number of features
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, DIMENSIONS),
            nn.SiLU(),
        )
        self.head = nn.Linear(DIMENSIONS, classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Return the logits of images in [-1, 1]."""
        return self.head(self.body(x))

    def features(self, images: Images, batch_size: int = 500) -> Float[Tensor, "n 64"]:
        """Return the penultimate features (N, 64) of images (N, C, H, W)."""
        return self._each_batch(self.body, images, batch_size)

    def predict(self, images: Images, batch_size: int = 500) -> Int[Tensor, " n"]:
        """Return the most probable class of each image."""
        return self._each_batch(self, images, batch_size).argmax(1)

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images whose class is recognised."""
        return float((self.predict(images) == labels).double().mean())

    @torch.inference_mode()
    def _each_batch(self, part: nn.Module, images: Images, batch_size: int) -> Tensor:
        if images.shape[1] != self.channels:
            raise UsageError(f"the images have {images.shape[1]} channels; this classifier takes {self.channels}")
        training = self.training
        self.eval()
        try:
            return torch.cat([part(_to_model(batch)) for batch in images.split(batch_size)])
        finally:
            self.train(training)

    # Files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write weights and description into one safetensors file; an interrupted write leaves the old one.

        Raises:
            StorageError: The file cannot be written.
        """
        path = Path(path)
        metadata = {"format": FORMAT, "channels": str(self.channels), "classes": str(self.classes)}
        metadata |= {f"about.{key}": value for key, value in self.about.items()}
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_bytes(safetensors.torch.save(dict(self.state_dict()), metadata))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            message = f"{path}: the classifier was not saved ({error.strerror}); free the disk or name another path"
            raise StorageError(message) from error

    @classmethod
    def load(cls, path: str | Path) -> "SmallClassifier":
        """Read a classifier that `save` wrote.

        Raises:
            ModelFileError: The file is missing, damaged or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            message = f"{path}: not a readable safetensors file ({error}); delete it and train anew"
            raise ModelFileError(message) from error
        if metadata.get("format") != FORMAT:
            raise ModelFileError(f"{path}: not a classifier of this version ({FORMAT!r}); delete it and train anew")
        about = {key.removeprefix("about."): value for key, value in metadata.items() if key.startswith("about.")}
        try:
            classifier = cls(int(metadata["channels"]), int(metadata["classes"]), about)
            classifier.load_state_dict(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelFileError(f"{path}: its weights do not fit its description; delete it and train anew") from error
        return classifier.eval()


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]


def _to_model(images: Images) -> Float[Tensor, "n c h w"]:
    return images.float() / 127.5 - 1


# Training -------------------------------------------------------------------------------------


def train_classifier(
    images: Images,
    labels: Labels,
    seed: int = 0,
    epochs: int = 3,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    about: dict[str, str] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> SmallClassifier:
    """Train a classifier; the same arguments, machine and number of threads give the same weights.

    Arguments:
        images: Training images (N, C, H, W).
        labels: Their classes (N,), from 0; there are max + 1 of them.
        seed: Seed of the first weights and of the order of the images.
        epochs: Passes over the images.
        batch_size: Images in a step.
        learning_rate: The peak of the learning rate's one cycle.
        about: What its file shall say of it, beside the settings here.
        progress: Called after each step with (step, steps, loss).

    Raises:
        UsageError: There are no images, or not one label for each.
        NonFiniteError: The loss became NaN or infinite.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise UsageError(f"{len(images)} images and {len(labels)} labels; there must be one label for each image")
    settings = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    about = {key: str(value) for key, value in settings.items()} | (about or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "classifier", "weights"))
        classifier = SmallClassifier(images.shape[1], int(labels.max()) + 1, about)
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)

    classifier.train()
    for step, rows in enumerate(epochs_of(len(images), batch_size, epochs, seed, "classifier"), start=1):
        loss = F.cross_entropy(classifier(_to_model(images[rows])), labels[rows].long())
        if not loss.isfinite():
            raise NonFiniteError(f"the classifier's loss is {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if progress:
            progress(step, steps, loss.item())
    return classifier.eval()


def epochs_of(count: int, batch_size: int, epochs: int, seed: int, purpose: str) -> Iterator[Int[Tensor, " b"]]:
    """Yield the rows of each batch: each epoch in an order of its own, fixed by the seed and what it is for."""
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, purpose, "order", epoch).permutation(count))
        yield from order.split(batch_size)
