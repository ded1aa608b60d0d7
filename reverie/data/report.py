"""The report on a data set, before anyone trains on it."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reverie.data.dataset import Dataset
from reverie.data.open import open_dataset

LISTED = 20
COMMON = 5


@dataclass(frozen=True)
class Report:
    """What a data set is.

    Arguments:
        source: As the user gave it.
        count: Images that can be read.
        shape: (C, H, W) that training would see.
        preparation: How images are brought to it.
        skipped: Files that can't be read, with the reason.
        duplicates: Images that are exactly another one.
        duplicate_pairs: The first of them, each with what it repeats.
        sizes: How many images have each size, the commonest first.
        modes: How many have each kind of pixel.
        classes: How many are in each class; empty without labels.
        captions: How many have a caption.
        caption_length: The longest caption's words.
        notes: What else a user should know.
        fingerprint: The sha256 of it all.
    """

    source: str
    count: int
    shape: tuple[int, int, int]
    preparation: str
    skipped: tuple[tuple[str, str], ...]
    duplicates: int
    duplicate_pairs: tuple[tuple[str, str], ...]
    sizes: dict[str, int]
    modes: dict[str, int]
    classes: dict[str, int]
    captions: int
    caption_length: int
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def suggestions(self) -> tuple[str, ...]:
        """What to look at before training, a line each."""
        return tuple(suggest(self))

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        return asdict(self) | {"suggestions": list(self.suggestions)}

    def to_text(self) -> str:
        """Return the report in words."""
        return "\n".join(lines(self))


def report(
    spec: str,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    on_bad: Literal["refuse", "skip"] = "skip",
    max_bad: float = 0.01,
    limit: int | None = None,
) -> Report:
    """Return the report on a source; the arguments are those of `open_dataset`.

    Raises:
        UsageError: There is no such source or path.
        DataError: There is no image that can be read.

    Example:
        >>> report("shapes:16,count=6").count
        6
    """
    return describe(open_dataset(spec, size=size, channels=channels, on_bad=on_bad, max_bad=max_bad, limit=limit))


def describe(dataset: Dataset) -> Report:
    """Return the report on a data set that is open."""
    headers = [dataset.header(i) for i in range(len(dataset))]
    captions = [caption for i in range(len(dataset)) if (caption := dataset.caption(i))]
    repeats = find_repeats(dataset)
    return Report(
        source=dataset.name,
        count=len(dataset),
        shape=dataset.shape,
        preparation=dataset.preparation,
        skipped=tuple((skipped.path, skipped.reason) for skipped in dataset.skipped),
        duplicates=len(repeats),
        duplicate_pairs=tuple(repeats[:LISTED]),
        sizes=count(f"{header.width}x{header.height}" for header in headers),
        modes=count(header.mode for header in headers),
        classes=count_classes(dataset),
        captions=len(captions),
        caption_length=max((len(caption.split()) for caption in captions), default=0),
        notes=dataset.notes,
        fingerprint=dataset.fingerprint,
    )


def count(values: Any) -> dict[str, int]:
    """Return how often each value comes, the commonest first."""
    return dict(Counter(values).most_common())


def count_classes(dataset: Dataset) -> dict[str, int]:
    """Return how many samples each class has, in the order of the classes."""
    labels = dataset.labels(range(len(dataset)))
    if labels is None:
        return {}
    counts = labels.bincount(minlength=len(dataset.classes)).tolist()
    return dict(zip(dataset.classes, counts, strict=True))


def find_repeats(dataset: Dataset) -> list[tuple[str, str]]:
    """Return each sample that is exactly an earlier one, with that one."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index in range(len(dataset)):
        groups[dataset.digest(index)].append(index)
    pairs = [(index, group[0]) for group in groups.values() for index in group[1:]]
    return [(place(dataset, index), place(dataset, first)) for index, first in sorted(pairs)]


def place(dataset: Dataset, index: int) -> str:
    """Return what to call a sample: its file, or its number."""
    return dataset.file(index) or f"image {index}"


def suggest(found: Report) -> Any:
    """Yield what to look at before training."""
    total = found.count + len(found.skipped)
    if len(found.skipped) > 0.01 * total:
        yield f"{len(found.skipped)} of {total} files can't be read: mend them, or train with --on-bad skip"
    if found.duplicates > 0.05 * found.count:
        yield f"{found.duplicates} images are exact copies of others; a model learns those by heart first"
    if found.classes and max(found.classes.values()) > 10 * max(1, min(found.classes.values())):
        rare = min(found.classes, key=lambda name: found.classes[name])
        yield f"the classes are uneven: {rare} has {found.classes[rare]} images"
    if found.count < 200:
        yield f"{found.count} images are few: expect them to be learnt by heart"


def lines(found: Report) -> Any:
    """Yield the report's lines."""
    channels, height, width = found.shape
    yield f"{found.source}: {found.count:,} images; training sees {channels} x {height} x {width} ({found.preparation})"
    yield f"sizes: {some(found.sizes)}; pixels: {some(found.modes)}"
    yield f"classes: {len(found.classes)} ({some(found.classes)})" if found.classes else "classes: none"
    yield (
        f"captions: {found.captions:,}, of {found.caption_length} words at most" if found.captions else "captions: none"
    )
    yield f"exact duplicates: {found.duplicates:,}"
    yield from (f"  {copy} is {original}" for copy, original in found.duplicate_pairs[:COMMON])
    yield f"unreadable: {len(found.skipped):,}"
    yield from (f"  {path}: {reason}" for path, reason in found.skipped[:LISTED])
    if len(found.skipped) > LISTED:
        yield f"  and {len(found.skipped) - LISTED:,} more"
    yield from found.notes
    yield f"fingerprint: {found.fingerprint}"
    yield from (f"note: {line}" for line in found.suggestions)


def some(counts: dict[str, int]) -> str:
    """Return the first few counts in words.

    Example:
        >>> some({"8x8": 10, "9x9": 1})
        '10 of 8x8, 1 of 9x9'
    """
    shown = ", ".join(f"{number:,} of {name}" for name, number in list(counts.items())[: 2 * COMMON])
    return shown if len(counts) <= 2 * COMMON else f"{shown}, and {len(counts) - 2 * COMMON} other kinds"
