"""A data set whose images lie in one array: what the digits, IDX files and .npz have in common."""

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from PIL import Image
from torch import Tensor

from reverie.base.errors import DataError
from reverie.data.dataset import Dataset, Header
from reverie.data.decode import describe, to_pixels
from reverie.data.options import Options
from reverie.data.size import choose_form, why

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ArrayImages(Dataset):
    """Images in an array, brought to their form when they are asked for.

    Arguments:
        name: The source, for messages.
        pixels: The images (N, H, W, C) with 1, 3 or 4 channels.
        options: How to read them.
        labels: The class numbers (N,), whatever numbers they are; None: no labels.
        captions: The text of each.
        notes: What a user should know.

    Raises:
        DataError: There are no images, or not as many labels or captions as images.
    """

    def __init__(
        self,
        name: str,
        pixels: UInt8[np.ndarray, "n h w c"],
        options: Options,
        labels: Integer[np.ndarray, " _"] | None = None,
        captions: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        _check_counts(name, len(pixels), labels=labels, captions=captions)
        chosen = options.subset(len(pixels))
        whole = isinstance(chosen, range)
        self.name = name
        self.pixels = pixels if whole else pixels[chosen]
        self.original = self._original()
        self.form = choose_form([self.original], options)
        self.shape = (self.form.channels, self.form.height, self.form.width)
        self.preparation = describe(self.form, [self.original]) + why([self.original], options)
        self.notes = tuple(notes)
        self.captions = None if captions is None else [captions[index] for index in chosen]
        if labels is not None:
            values, numbers = np.unique(labels, return_inverse=True)
            self.classes = tuple(str(value) for value in values)
            self.targets = torch.from_numpy(numbers.astype(np.int64)[list(chosen)])

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """Return the images (B, C, H, W) of some samples."""
        pixels = self.pixels[np.asarray(indices, dtype=np.int64)]
        if pixels.shape[1:] == (self.form.height, self.form.width, self.form.channels):
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        mode = _MODES[pixels.shape[3]]
        pictures = [Image.fromarray(image[..., 0] if mode == "L" else image, mode) for image in pixels]
        return torch.from_numpy(np.stack([to_pixels(picture, self.form) for picture in pictures]))

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"] | None:
        """Return the classes (B,) of some samples, or None without labels."""
        if not self.classes:
            return None
        return self.targets[torch.as_tensor(np.asarray(indices, dtype=np.int64))]

    def caption(self, index: int) -> str | None:
        """Return a sample's text, or None."""
        return None if self.captions is None else self.captions[index]

    def header(self, index: int) -> Header:
        """Return what the images were before they were prepared."""
        return self.original

    def digest(self, index: int) -> bytes:
        """Return the sha256 of a sample's pixels."""
        return sha256(repr(self.pixels.shape[1:]).encode() + self.pixels[index].tobytes()).digest()

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all pixels, labels and captions, in hexadecimal: one pass, not one for each image."""
        total = sha256(repr((self.pixels.shape, self.classes, self.captions)).encode())
        total.update(np.ascontiguousarray(self.pixels).data)
        if self.classes:
            total.update(self.targets.numpy().data)
        return total.hexdigest()

    def _original(self) -> Header:
        _, height, width, channels = self.pixels.shape
        return Header(width, height, _MODES[channels], "array", grey=channels == 1, alpha=channels == 4)


def _check_counts(name: str, count: int, **parts: Sequence | np.ndarray | None) -> None:
    """Refuse an empty array, and labels or captions of another number."""
    if not count:
        raise DataError(f"{name}: has no images in it")
    for what, values in parts.items():
        if values is not None and len(values) != count:
            raise DataError(f"{name}: {count:,} images and {len(values):,} {what}; they must be as many")
