"""A data set of image files: what a folder, an archive and the hub have in common.

Images that fit the cache are decoded once, when the data set is opened. Others are decoded when asked for;
one that has changed or broken since is replaced by the next that can be read, with that one's label and
caption, is named in `broken`, and counts against max_bad.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from threading import Lock

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from reverie.data.dataset import Dataset, Header, Skipped
from reverie.data.decode import BadImage, decode, describe
from reverie.data.options import Options
from reverie.data.scan import refuse_beyond, scan
from reverie.data.size import why
from reverie.data.stores import Entry


class ImageFiles(Dataset):
    """Images that are files.

    Arguments:
        name: The source, for messages.
        entries: Its files, in order.
        options: How to read them.
        classes: The names of the classes; () without labels.
        labels: The class of each file, by its name; of all of them or of none.
        captions: The text of files, by name.
        notes: What a user should know.

    Raises:
        DataError: More files than allowed can't be read, or none can.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        options: Options,
        classes: Sequence[str] = (),
        labels: Mapping[str, int] | None = None,
        captions: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        entries = [entries[index] for index in options.subset(len(entries))]
        found = scan(entries, options, name)
        self.name = name
        self.options = options
        self.entries, self.headers, self.digests, self.pixels = (
            found.entries,
            found.headers,
            found.digests,
            found.pixels,
        )
        self.form = found.form
        self.shape = (found.form.channels, found.form.height, found.form.width)
        self.classes = tuple(classes)
        self.skipped = tuple(found.skipped)
        self.notes = tuple(notes)
        self.preparation = describe(found.form, found.headers) + why(found.headers, options)
        self.captions = captions or {}
        self.targets = None if labels is None else torch.tensor([labels[entry.name] for entry in self.entries])
        self._broken: dict[int, Skipped] = {}
        self._lock = Lock()
        self.fingerprint  # noqa: B018 - taken now, before any file can break and be replaced

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """Return the images (B, C, H, W) of some samples.

        Raises:
            DataError: More files than allowed have broken since the data set was opened.
        """
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[np.asarray(indices, dtype=np.int64)])
        return torch.from_numpy(np.stack([self._read(int(index)) for index in indices]))

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"] | None:
        """Return the classes (B,) of some samples, or None without labels."""
        if self.targets is None:
            return None
        return self.targets[torch.tensor([self._stand_in(int(index)) for index in indices], dtype=torch.int64)]

    def caption(self, index: int) -> str | None:
        """Return a sample's text, or None."""
        return self.captions.get(self.entries[self._stand_in(index)].name)

    def file(self, index: int) -> str:
        """Return the path of a sample's file."""
        return self.entries[index].path

    def header(self, index: int) -> Header:
        """Return what a sample's file says of itself."""
        return self.headers[index]

    def digest(self, index: int) -> bytes:
        """Return the sha256 of a sample's file."""
        return self.digests[index]

    @property
    def broken(self) -> tuple[Skipped, ...]:
        """The files that could be read when the data set was opened, and no more."""
        return tuple(self._broken[index] for index in sorted(self._broken))

    def _place(self, index: int) -> str:
        return self.entries[index].name

    def _stand_in(self, index: int) -> int:
        """Return the sample that is given for one: itself, or the next that is not broken."""
        while index in self._broken:
            index = (index + 1) % len(self)
        return index

    def _read(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        """Decode a sample, or the next one that can be."""
        while True:
            index = self._stand_in(index)
            try:
                return self._decode(index)
            except BadImage as reason:
                self._mark(index, str(reason))

    def _decode(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        data = self.entries[index].read()
        pixels = decode(data, self.form)
        if sha256(data).digest() != self.digests[index]:
            raise BadImage("has changed since it was first read")
        return pixels

    def _mark(self, index: int, reason: str) -> None:
        """Name a file that broke after the opening scan, and end if they are too many."""
        with self._lock:
            self._broken[index] = Skipped(self.entries[index].path, f"{reason} (it was whole at the start)")
            if len(self._broken) > self.options.allowed_bad(len(self)):
                refuse_beyond(self.broken, len(self), self.options, self.name)
