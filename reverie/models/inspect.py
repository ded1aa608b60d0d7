"""What a path holds: a run, a checkpoint, a model, a file of weights, a picture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError
from reverie.models.formats import existing, readable, recognise
from reverie.models.formats.files import what_is
from reverie.models.model import Model
from reverie.models.provenance import read_provenance


def describe(path: Path | str) -> dict[str, Any]:
    """Return what a path holds, as JSON can hold it.

    A model that is damaged is described as far as it goes, with a "problem" that says why no further.

    Raises:
        UsageError: There is nothing at that path.
        ModelFileError: It is nothing that reverie knows.
        DataError: It is a damaged picture.
    """
    path = existing(path)
    if path.is_file() and (what_is(path) or "").startswith("a PNG"):
        return {"path": str(path), "kind": "picture", **read_provenance(path)}
    kind = recognise(path)
    found: dict[str, Any] = {"path": str(path), "kind": kind.name}
    try:
        with readable(path):
            found |= describe_model(kind.read(path))
    except ModelFileError as error:
        found["problem"] = str(error)
    try:
        with readable(path):
            return found | kind.describe(path)
    except ModelFileError as error:
        return found | {"problem": found.get("problem", str(error))}


def describe_model(model: Model) -> dict[str, Any]:
    """Return what a model is."""
    card = model.card
    found: dict[str, Any] = {
        "shape": list(card.shape),
        "samples": card.kind,
        "network": card.network.name,
        "parameters": model.parameters,
        "schedule": {"name": card.schedule.name, **card.schedule.options},
        "predicts": card.prediction,
        "learned variance": card.learned_variance,
        "classes": list(card.classes),
        "sampling": card.sampling.model_dump(mode="json"),
        "data": card.data.model_dump(mode="json") if card.data else None,
        "training": card.training.model_dump(mode="json") if card.training else None,
        "code": card.code or None,
        "sha256": model.digest,
        **model.origin,
    }
    return found | ({"warnings": list(model.warnings)} if model.warnings else {})


def describe_text(found: Mapping[str, Any]) -> str:
    """Return a description for people, a line for each thing.

    Example:
        >>> print(describe_text({"kind": "run", "classes": ["zero", "one"], "data": None, "training": {"steps": 3}}))
        kind      run
        classes   zero, one
        training
          steps   3
    """
    lines = list(pairs(found))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in lines)


def pairs(found: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Yield what there is to say, each with its name, leaving out what there is not."""
    for name, value in found.items():
        if value is None or value in ([], {}):
            continue
        if isinstance(value, Mapping):
            yield f"{indent}{name}", ""
            yield from pairs(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name}", ", ".join(str(part) for part in value)
        else:
            yield f"{indent}{name}", f"{value:,}" if name == "parameters" else str(value)
