"""Which form to bring images to, when nobody said."""

from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from reverie.data.dataset import Header
from reverie.data.decode import Form
from reverie.data.options import Options

LARGEST_KEPT = 256
CHOICES = (8, 16, 24, 32, 48, 64)


def choose_form(headers: Sequence[Header], options: Options) -> Form:
    """Return the channels and size of a data set: as asked for, else from what its images are.

    Channels: 1 where every image's mode is grey, else 3. Size: the images' own where all are equal and no
    side is beyond LARGEST_KEPT; else square, the largest of CHOICES that the median short side holds.

    Example:
        >>> choose_form([Header(600, 400, "L", "PNG", grey=True), Header(90, 50, "RGB", "PNG")], Options())
        Form(channels=3, height=48, width=48)
    """
    channels = options.channels or (1 if all(header.grey for header in headers) else 3)
    return Form(channels, *(options.sides or _choose_sides(headers)))


def why(headers: Sequence[Header], options: Options) -> str:
    """Return how the size came about, in brackets, for `preparation`; nothing where it was asked for or kept."""
    if options.sides is not None or _common(headers):
        return ""
    return f" (chosen: the median short side is {_median_side(headers)}; --size sets another)"


def size_counts(headers: Sequence[Header]) -> list[tuple[tuple[int, int], int]]:
    """Return ((width, height), how many), the most common first."""
    counts = Counter((header.width, header.height) for header in headers)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _common(headers: Sequence[Header]) -> tuple[int, int] | None:
    """Return (H, W) where all images have it and it is not too large."""
    sizes = {(header.height, header.width) for header in headers}
    first = next(iter(sizes))
    return first if len(sizes) == 1 and max(first) <= LARGEST_KEPT else None


def _choose_sides(headers: Sequence[Header]) -> tuple[int, int]:
    side = max((choice for choice in CHOICES if choice <= _median_side(headers)), default=CHOICES[0])
    return _common(headers) or (side, side)


def _median_side(headers: Sequence[Header]) -> int:
    return median_low(min(header.width, header.height) for header in headers)
