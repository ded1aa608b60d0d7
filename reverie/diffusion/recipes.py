"""Solvers fitted beforehand, for models that have none of their own: to mixtures, some to a network too, by schedule.

The table beside this file was made by tools/fit_recipes.py, for samples of few numbers, some and many, and has no
solver that was much farther than UniPC on some trained networks. On a model that it was not fitted to it cannot be the
best there is; docs/benchmarks.md has how it compares with the published solvers at each number of steps.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from reverie.diffusion.grids import ends
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.schedules import Schedule

FILE = Path(__file__).with_suffix(".json")
# Below how many numbers a sample counts as such.
SIZES = (("points", 16), ("few", 40), ("small", 2048), ("large", math.inf))
SAME = 0.02  # in lambda: how near a schedule's ends must be to those of the one that was fitted


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """Return the recipes as they are in the file, by schedule and number of steps."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def general(schedule: Schedule, steps: int, numbers: int) -> Recipe | None:
    """Return the solver of so many steps that was fitted beforehand for schedules like this one; None for none.

    A schedule is like another if it begins and ends at the same lambda: between, lambda is the solver's own clock.

    Arguments:
        schedule: The model's schedule.
        steps: The number of evaluations.
        numbers: How many numbers a sample has.

    Example:
        >>> from reverie.diffusion.registry import schedules
        >>> general(schedules["linear"](), 8, 64).steps, general(schedules["linear"](), 777, 64)
        (8, None)
    """
    wanted = [size for size, below in SIZES if numbers < below]
    # What has none for points, or for few, was fitted when those were among the small ones.
    usable = wanted[: wanted.index("small") + 1] if "small" in wanted else wanted[:1]
    for name, sizes in table().items():
        if alike(schedule, name):
            return next((of_row(row) for size in usable if (row := sizes.get(size, {}).get(str(steps)))), None)
    return None


def of_row(row: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a row of the file holds."""
    return Recipe(tuple(row["lam"]), tuple(tuple(weights) for weights in row["weights"]), tuple(row.get("kept", ())))


def alike(schedule: Schedule, name: str) -> bool:
    """Return whether a schedule begins and ends as one by name does."""
    return all(abs(a - b) < SAME for a, b in zip(span(schedule), named_span(name), strict=True))


@lru_cache(maxsize=64)
def named_span(name: str) -> tuple[float, float]:
    """Return the first and last lambda of a schedule by name."""
    from reverie.diffusion.registry import schedules

    return span(schedules[name]())


def span(schedule: Schedule) -> tuple[float, float]:
    """Return the first and last lambda that a sampler looks at."""
    first, last = ends(schedule)
    return first / 2, last / 2
