"""What `open_dataset` was asked for, checked once, and given to every source."""

from dataclasses import dataclass
from typing import Literal

from reverie.base.errors import UsageError

MAX_SIZE = 8192


@dataclass(frozen=True)
class Options:
    """How a source is to be read; every field is checked when it is made.

    Arguments:
        size: The side of the square images, or (H, W); None: chosen from the data.
        channels: 1 (grey), 3 (RGB), 4 (RGBA); None: 1 where all images are grey, else 3.
        on_bad: "refuse": more than max_bad unreadable files are an error; "skip": any number short of all.
        max_bad: The fraction of the files that may be left out under "refuse".
        limit: At most this many samples, spread evenly over the source.
        cache: Bytes that decoded images may take; a source that needs more is decoded on demand.

    Raises:
        UsageError: A value lies outside its range.
    """

    size: int | tuple[int, int] | None = None
    channels: int | None = None
    on_bad: Literal["refuse", "skip"] = "refuse"
    max_bad: float = 0.01
    limit: int | None = None
    cache: int = 1 << 30

    def __post_init__(self) -> None:
        if self.on_bad not in ("refuse", "skip"):
            raise UsageError(f"on_bad is {self.on_bad!r}; it must be refuse or skip")
        if self.channels not in (None, 1, 3, 4):
            raise UsageError(f"channels is {self.channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"max_bad is {self.max_bad}; it must lie in [0, 1], a fraction of the files")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is {self.limit}; it must be at least 1")
        if self.cache < 0:
            raise UsageError(f"cache is {self.cache}; it must be a number of bytes, 0 for none")
        for side in self.sides or ():
            if not 1 <= side <= MAX_SIZE:
                raise UsageError(f"size is {self.size}; each side must lie in [1, {MAX_SIZE}]")

    @property
    def sides(self) -> tuple[int, int] | None:
        """(H, W) as asked for, or None."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def subset(self, count: int) -> range | list[int]:
        """Return which of a source's samples to take: all, or `limit` of them spread evenly.

        Example:
            >>> Options(limit=3).subset(9)
            [0, 3, 6]
        """
        if self.limit is None or self.limit >= count:
            return range(count)
        return [index * count // self.limit for index in range(self.limit)]

    def allowed_bad(self, count: int) -> int:
        """Return how many of so many files may be unreadable.

        Example:
            >>> Options().allowed_bad(100), Options(on_bad="skip").allowed_bad(100)
            (1, 99)
        """
        return count - 1 if self.on_bad == "skip" else min(int(self.max_bad * count + 1e-9), count - 1)
