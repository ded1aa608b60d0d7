r"""What every data source gives: images by index, as uint8 tensors of one shape, and what is known of them.

A data set is a sequence of n samples. Sample i has an image, and may have a label and a caption; each is a
function of i alone, so that a run that is resumed, or has other workers, sees the same data. What the
samples are is summed up in a fingerprint,

    fingerprint = sha256(name_i, digest_i, label_i, caption_i for i = 0 .. n - 1),                   (1)

taken over content and over no date, so that a copy of a folder on another machine is the same data.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

from jaxtyping import Int64, UInt8
from torch import Tensor


class Skipped(NamedTuple):
    """A file that was left out, and why.

    Example:
        >>> print(Skipped("cat.png", "empty file"))
        cat.png: empty file
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a sample was before it was prepared.

    Arguments:
        width: In pixels, as it is to be seen (after its EXIF orientation).
        height: In pixels.
        mode: Pillow's name for its pixels: "L", "RGB", "RGBA", "P", "I;16", ...
        format: The file's format, or what it came from: "PNG", "array".
        grey: Whether its mode has no colours.
        alpha: Whether it has transparency.
        turned: Whether its EXIF orientation turns or mirrors it.
        frames: How many pictures the file holds; the first is taken.
    """

    width: int
    height: int
    mode: str
    format: str
    grey: bool = False
    alpha: bool = False
    turned: bool = False
    frames: int = 1


class Dataset(ABC):
    """Images by index; made by `open_dataset`.

    Attributes:
        name: The source, as the user gave it.
        shape: (C, H, W) of every image, after resizing and cropping.
        classes: The names of the classes; () without labels.
        skipped: The files that were named and left out.
        preparation: One line: how images are converted, resized and cropped.
        notes: What else a user should know, a line each.

    Example:
        >>> from reverie.data import open_dataset
        >>> digits = open_dataset("digits")
        >>> len(digits), digits.shape, digits.images([0, 7]).shape, digits.labels([0, 7])
        (1797, (1, 8, 8), torch.Size([2, 1, 8, 8]), tensor([0, 7]))
    """

    name: str = ""
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    preparation: str = ""
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """Return the images (B, C, H, W) of some samples."""

    @abstractmethod
    def digest(self, index: int) -> bytes:
        """Return a hash of what a sample's image is made of; equal for exact duplicates."""

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"] | None:
        """Return the classes (B,) of some samples, or None without labels."""
        return None

    def caption(self, index: int) -> str | None:
        """Return a sample's text, or None."""
        return None

    def file(self, index: int) -> str | None:
        """Return where a sample came from, for messages, or None where it is no file."""
        return None

    def header(self, index: int) -> Header:
        """Return what a sample was before it was prepared."""
        channels, height, width = self.shape
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        return Header(width, height, mode, "array", grey=channels == 1, alpha=channels == 4)

    @property
    def broken(self) -> tuple[Skipped, ...]:
        """The files that could be read when the data set was opened, and no more."""
        return ()

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (1) of all samples, in hexadecimal."""
        total = sha256(repr(self.classes).encode())
        labels = self.labels(range(len(self)))
        for index in range(len(self)):
            label = None if labels is None else int(labels[index])
            total.update(repr((self._place(index), self.digest(index), label, self.caption(index))).encode())
        return total.hexdigest()

    def _place(self, index: int) -> str:
        """Return a sample's name within the source, which stays when the source is moved or copied."""
        return ""
