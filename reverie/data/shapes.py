r"""Coloured shapes on white, made on the spot: pictures whose every word and measure is known.

A scene has one or two groups; a group has one to three equal shapes of a kind, colour and size, at a place:
"two small red circles at the top left and a large blue star at the bottom right". Scene i is a function of
(seed, i) alone, in units of the picture's sides, so that any resolution draws the same scenes.

A shape is drawn through its signed distance d in pixels (negative inside), antialiased to the coverage

    a = clip(1/2 - d, 0, 1),                                                                         (1)

and mixed into the picture as (1 - a) background + a colour. `read_scene` in reading.py goes the other way.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from PIL import Image
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import generator
from reverie.base.registry import nearest
from reverie.data.dataset import Dataset
from reverie.data.decode import Form, to_pixels
from reverie.data.options import Options

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
}
BACKGROUND = (255, 255, 255)
SIZES = {"small": (0.085, 0.105), "large": (0.17, 0.20)}  # radii, in units of the shorter side
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "centre": (0.5, 0.5),
}
NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
MARGIN = 0.02  # between a shape and the edge
GAP = 0.07  # between two shapes
SMALLEST = 16
DEFAULT_SIZE = 32
DEFAULT_COUNT = 5000
_TRIES = 256  # arrangements drawn at once
_VERSION = 1  # of the drawing: a fingerprint of another is other data


# Kinds ----------------------------------------------------------------------------------------


def _polygon(*corners: tuple[float, float]) -> Float[np.ndarray, "k 2"]:
    return np.array(corners)


def _star(points: int, inner: float) -> Float[np.ndarray, "k 2"]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


_ARM = 0.32
# Corners (x, y) in units of the radius, y downwards; the circle has none.
KINDS: dict[str, np.ndarray] = {
    "circle": np.empty((0, 2)),
    "square": _polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": _polygon(*[(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]),
    "star": _star(5, 0.45),
    "cross": _polygon(
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip


def distance(
    kind: str, x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"], radius: float
) -> Float[np.ndarray, "h w"]:
    """Return the signed distance in pixels from points to a shape about the origin: negative inside.

    Arguments:
        kind: One of KINDS.
        x: The points' horizontal places in pixels.
        y: Their vertical places, downwards.
        radius: Of the circle about the shape, in pixels.
    """
    corners = KINDS[kind] * radius
    if not len(corners):
        return np.hypot(x, y) - radius
    closest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        along = along.clip(0, 1)
        closest = np.minimum(closest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        if ay != by:  # an edge that a ray to the right may cross
            crossing = ax + (y - ay) / (by - ay) * (bx - ax)
            inside ^= ((ay > y) != (by > y)) & (x < crossing)
    return np.where(inside, -closest, closest)


def coverage(
    kind: str, centre: tuple[float, float], radius: float, height: int, width: int
) -> Float[np.ndarray, "h w"]:
    """Return how much of each pixel a shape covers (H, W), by (1); all in pixels."""
    covered = np.zeros((height, width))
    columns, rows = (_window(middle, radius, side) for middle, side in zip(centre, (width, height), strict=True))
    x, y = np.meshgrid(columns + (0.5 - centre[0]), rows + (0.5 - centre[1]))
    covered[rows[:, None], columns] = (0.5 - distance(kind, x, y, radius)).clip(0, 1)
    return covered


def _window(middle: float, radius: float, side: int) -> Int[np.ndarray, " n"]:
    """Return the pixels along one side that a shape can touch."""
    return np.arange(max(int(middle - radius) - 1, 0), min(int(middle + radius) + 3, side))


# Scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Arguments:
        kind: One of KINDS.
        colour: One of COLOURS.
        size: "small" or "large".
        x: Its centre, in units of the width.
        y: Its centre, in units of the height, downwards.
        radius: In units of the shorter side.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, order=True)
class Group:
    """Equal shapes at a place, in words."""

    count: int
    size: str
    colour: str
    kind: str
    place: str

    def __str__(self) -> str:
        kind = self.kind if self.count == 1 else {"cross": "crosses"}.get(self.kind, f"{self.kind}s")
        where = "in the centre" if self.place == "centre" else f"at the {self.place}"
        number = NUMBERS[self.count] if self.count < len(NUMBERS) else str(self.count)
        return f"{number} {self.size} {self.colour} {kind} {where}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Arguments:
        shapes: One after the other, in the order of their groups.
    """

    shapes: tuple[Shape, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in order: shapes of one kind, colour and size, at the place of their mean."""
        members: dict[tuple[str, str, str], list[Shape]] = {}
        for shape in self.shapes:
            members.setdefault((shape.size, shape.colour, shape.kind), []).append(shape)
        return tuple(Group(len(shapes), *words, place_of(shapes)) for words, shapes in members.items())

    @property
    def words(self) -> Counter[Group]:
        """The groups whatever their order: equal where two scenes have equal captions."""
        return Counter(self.groups)

    @property
    def caption(self) -> str:
        """The scene in words.

        Example:
            >>> stars = [Shape("star", "red", "small", x, 0.3, 0.1) for x in (0.2, 0.4)]
            >>> Scene(tuple(stars)).caption
            'two small red stars at the top left'
        """
        return " and ".join(map(str, self.groups)) or "nothing"


def place_of(shapes: Sequence[Shape]) -> str:
    """Return the place that the mean of some shapes' centres is at: within 0.1 of the middle, or a quarter."""
    x, y = (float(np.mean([getattr(shape, axis) for shape in shapes])) for axis in ("x", "y"))
    if max(abs(x - 0.5), abs(y - 0.5)) < 0.1:
        return "centre"
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


Split = Literal["all", "train", "held-out"]
HELD = 10  # one in so many kinds of group is held out, where that is asked for


def held(group: Group) -> bool:
    """Return whether a group's words are among those that split "train" never shows.

    Example:
        >>> held(Group(1, "large", "red", "star", "centre"))
        False
    """
    return int.from_bytes(sha256(str(group).encode()).digest()[:4]) % HELD == 0


@lru_cache(maxsize=20_000)
def make_scene(seed: int, index: int, most_groups: int = 2, split: Split = "all") -> Scene:
    """Return a scene, fixed by (seed, index): first its words, each as likely as any other, then the centres.

    Arguments:
        seed: Of the data set.
        index: Of the scene.
        most_groups: 1 or 2.
        split: "train" draws no group that is `held`, "held-out" no other.

    Example:
        >>> make_scene(0, 3) == make_scene(0, 3), len(make_scene(0, 3, most_groups=1).groups)
        (True, 1)
    """
    random = generator(seed, "shapes", index)
    return arrange(random, _draw_groups(random, int(random.integers(1, most_groups + 1)), split))


def arrange(random: np.random.Generator, groups: Sequence[Group]) -> Scene:
    """Return a scene of some groups: what their words leave open, radii and centres, is drawn.

    Arguments:
        random: What it is drawn from.
        groups: One, or two at different places and with different looks.

    Example:
        >>> group = Group(2, "small", "red", "star", "top left")
        >>> arrange(generator(0), [group]).groups == (group,)
        True
    """
    radii = [float(random.uniform(*SIZES[group.size])) for group in groups]
    while True:
        shapes: list[Shape] = []
        for group, radius in zip(groups, radii, strict=True):
            shapes += _arrange(random, group, radius, shapes)
        if len(shapes) == sum(group.count for group in groups):
            return Scene(tuple(shapes))


def _draw_groups(random: np.random.Generator, count: int, split: Split) -> list[Group]:
    """Draw groups at different places, with different looks, of a split."""
    places = [place for place in PLACES if count == 1 or place != "centre"]
    while True:
        groups = []
        for place in random.permutation(len(places))[:count]:
            size, colour, kind = (list(names)[random.integers(len(names))] for names in (SIZES, COLOURS, KINDS))
            number = int(random.integers(1, 4)) if size == "small" else 1
            groups.append(Group(number, size, colour, kind, places[place]))
        different = len({(group.size, group.colour, group.kind) for group in groups}) == count
        if different and (split == "all" or all(held(group) == (split == "held-out") for group in groups)):
            return groups


def _arrange(random: np.random.Generator, group: Group, radius: float, others: Sequence[Shape]) -> list[Shape]:
    """Return a group's shapes, apart from each other and from others and plainly at their place; [] if none fit."""
    reach = min(0.5 - MARGIN - radius, 0.25 if group.place == "centre" else 0.19)
    middle = np.array(PLACES[group.place])
    low, high = np.maximum(middle - reach, radius + MARGIN), np.minimum(middle + reach, 1 - radius - MARGIN)
    centres = random.uniform(low, high, (_TRIES, group.count, 2))
    off = np.abs(centres.mean(1) - 0.5)
    good = off.max(1) < 0.07 if group.place == "centre" else off.min(1) > 0.13
    for i in range(group.count):
        for j in range(i):
            good &= np.hypot(*(centres[:, i] - centres[:, j]).T) > 2 * radius + GAP
        for other in others:
            good &= np.hypot(*(centres[:, i] - (other.x, other.y)).T) > radius + other.radius + GAP
    if not good.any():
        return []
    chosen = centres[good.argmax()]
    return [Shape(group.kind, group.colour, group.size, float(x), float(y), radius) for x, y in chosen]


def draw(scene: Scene, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Return a scene as a picture (H, W, 3)."""
    picture = np.empty((height, width, 3))
    picture[:] = BACKGROUND
    for shape in scene.shapes:
        centre = shape.x * width, shape.y * height
        covered = coverage(shape.kind, centre, shape.radius * min(height, width), height, width)[..., None]
        picture += covered * (np.array(COLOURS[shape.colour]) - picture)
    return np.rint(picture).astype(np.uint8)


# The data set ---------------------------------------------------------------------------------


class Shapes(Dataset):
    """Scenes by index, drawn when they are asked for, and kept where they fit the cache.

    The label of a scene is the kind of its first group; `truth` tells all of it.

    Arguments:
        count: How many scenes.
        seed: Which ones.
        most_groups: How many groups a scene has at most: with 1 the label says all of its kinds.
        options: The size (32 by default), the channels (3).
        split: Which words its groups may have: "all", or "train" and "held-out", which have none in common.
    """

    def __init__(self, count: int, seed: int, most_groups: int, options: Options, split: Split = "all") -> None:
        height, width = options.sides or (DEFAULT_SIZE, DEFAULT_SIZE)
        if min(height, width) < SMALLEST:
            raise UsageError(
                f"shapes: size {width}x{height}; each side must be at least {SMALLEST} for kinds to differ"
            )
        self.name = "shapes"
        self.seed, self.most_groups, self.split = seed, most_groups, split
        self.chosen = options.subset(count)
        self.form = Form(options.channels or 3, height, width)
        self.shape = (self.form.channels, self.form.height, self.form.width)
        self.classes = tuple(KINDS)
        self.preparation = f"{count} scenes of seed {seed}, drawn at {width}x{height}"
        fits = len(self.chosen) * math.prod(self.form) <= options.cache
        self._kept: dict[int, np.ndarray] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.chosen)

    def truth(self, index: int) -> Scene:
        """Return what a picture shows, exactly."""
        return make_scene(self.seed, self.chosen[index], self.most_groups, self.split)

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """Return the pictures (B, C, H, W) of some scenes."""
        return torch.from_numpy(np.stack([self._image(int(index)) for index in indices]))

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"]:
        """Return the kind of each scene's first group (B,)."""
        return torch.tensor([self.classes.index(self.truth(int(index)).shapes[0].kind) for index in indices])

    def caption(self, index: int) -> str:
        """Return a scene in words."""
        return self.truth(index).caption

    def digest(self, index: int) -> bytes:
        """Return the sha256 of a picture."""
        return sha256(self._image(index).tobytes()).digest()

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of what the scenes are made from, in hexadecimal: they are a function of it."""
        made_of: tuple[object, ...] = (_VERSION, self.seed, self.most_groups, list(self.chosen), self.form)
        made_of += (self.split,) if self.split != "all" else ()
        return sha256(repr(made_of).encode()).hexdigest()

    def _image(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        picture = Image.fromarray(draw(self.truth(index), self.form.height, self.form.width))
        pixels = to_pixels(picture, self.form)
        if self._kept is not None:
            self._kept[index] = pixels
        return pixels


def open_shapes(argument: str, options: Options) -> Shapes:
    """Return shapes: "", or a size and options: "64", "32,count=1000,seed=7,groups=1,split=train".

    Raises:
        UsageError: An option is unknown or out of its range, or the size is given twice.

    Example:
        >>> open_shapes("32,count=3", Options()).caption(0)
        'a large purple triangle at the top right'
    """
    values = {"count": DEFAULT_COUNT, "seed": 0, "groups": 2}
    size = options.size
    split: Split = "all"
    for position, part in enumerate(filter(None, argument.split(","))):
        key, equals, value = part.partition("=")
        if not equals and position == 0:
            if options.size is not None:
                raise UsageError(f"shapes:{argument}: the size is given twice, {key} and {options.size}; give it once")
            size = _whole_number(argument, "size", key, SMALLEST)
        elif key == "split":
            split = _one_of(argument, value, get_args(Split))
        elif key not in values or not equals:
            raise UsageError(
                f"shapes:{argument}: unknown option {key!r}{nearest(key, values)} (known: {', '.join(values)}, split; "
                "as in shapes:64,count=1000,seed=1)"
            )
        else:
            values[key] = _whole_number(argument, key, value, 0 if key == "seed" else 1)
    if values["groups"] > 2:
        raise UsageError(f"shapes:{argument}: groups is {values['groups']}; it must be 1 or 2")
    options = Options(size, options.channels, options.on_bad, options.max_bad, options.limit, options.cache)
    return Shapes(values["count"], values["seed"], values["groups"], options, split)


def _one_of(argument: str, value: str, known: Sequence[Any]) -> Any:
    if value not in known:
        raise UsageError(f"shapes:{argument}: split is {value!r}; it must be one of {', '.join(known)}")
    return value


def _whole_number(argument: str, key: str, value: str, least: int) -> int:
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise UsageError(f"shapes:{argument}: {key} is {value!r}; it must be a whole number, {least} or more")
    return int(value)
