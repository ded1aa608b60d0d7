"""A training run's folder, and one checkpoint of it: the card at its root, the weights from a checkpoint."""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.registry import nearest
from reverie.models.card import Card, TrainingRecord, read_card
from reverie.models.checkpoints import Checkpoint, CheckpointStore, open_checkpoint, read_manifest, verify
from reverie.models.formats.base import Format, build_unfilled
from reverie.models.formats.codec_file import beside
from reverie.models.formats.weights import install
from reverie.models.model import Model

CARD, CHECKPOINTS = "card.json", "checkpoints"
RAW = "model"  # the group of the weights that are not averaged
STEP = re.compile(r"step-\d{8,}(-\d+)?", re.ASCII)


class RunFolder(Format):
    """A run: runs/NAME, as training leaves it."""

    name = "run"
    sign = f"a folder with {CARD} and {CHECKPOINTS}/, as training makes it"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and (path / CARD).is_file()

    def read(self, path: Path, ema: str | None = None) -> Model:
        card = read_card(path / CARD)
        checkpoint = CheckpointStore(path / CHECKPOINTS).latest()
        if checkpoint is None:
            raise ModelFileError(
                f"{path} has no checkpoint yet: its training has not come to the first save; wait for it, or go on "
                f"with reverie train --out {path} --resume"
            )
        return from_checkpoint(checkpoint, card, path, path, ema)

    def describe(self, path: Path) -> dict[str, Any]:
        candidates = CheckpointStore(path / CHECKPOINTS).candidates()
        return {"checkpoints": {folder.name: "; ".join(verify(folder)) or "verified" for folder in candidates}}


class CheckpointFolder(Format):
    """One checkpoint of a run: runs/NAME/checkpoints/step-00000500."""

    name = "checkpoint"
    sign = f"a folder of a run's {CHECKPOINTS}/"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and STEP.fullmatch(path.absolute().name) is not None

    def read(self, path: Path, ema: str | None = None) -> Model:
        card = run_of(path) / CARD
        if not card.is_file():
            raise ModelFileError(f"{path} is a checkpoint without its run: {card} is missing; put it back into its run")
        return from_checkpoint(open_checkpoint(path), read_card(card), path, run_of(path), ema)

    def describe(self, path: Path) -> dict[str, Any]:
        groups = sorted(name for name in read_manifest(path)["files"] if name.endswith(".safetensors"))
        return {"verified": "; ".join(verify(path)) or "yes", "files": groups}


def run_of(checkpoint: Path) -> Path:
    """Return the run that a checkpoint's folder belongs to."""
    return checkpoint.absolute().parent.parent


def from_checkpoint(checkpoint: Checkpoint, card: Card, path: Path, run: Path, ema: str | None) -> Model:
    """Return the model of a verified checkpoint of a run, which is at a path."""
    group = choose_group(checkpoint, path, ema)
    denoiser = build_unfilled(card, str(path))
    file = checkpoint.path / f"{group}.safetensors"
    install(denoiser.network, [file], str(file))
    origin = {"checkpoint": checkpoint.path.name, "weights": group}
    codec = beside(run, card)
    return Model(denoiser, with_training(card, checkpoint), str(path), origin, checkpoint.warnings, codec=codec)


def choose_group(checkpoint: Checkpoint, path: Path, ema: str | None) -> str:
    """Return the group of weights that is asked for: by default the averages that the run samples from.

    Raises:
        UsageError: There are no such weights; the message lists those there are.
    """
    there = [group for group in checkpoint.groups if group.startswith("ema-")]
    if ema is None:
        first = next((name for name in checkpoint.record.get("averages", there) if name in there), None)
        return first or (there[-1] if there else RAW)
    if ema == "none":
        return RAW
    name = ema if ema.startswith("ema-") else f"ema-{ema}"
    if name not in there:
        known = ", ".join([*there, "none"])
        raise UsageError(f"{path} has no averaged weights {ema!r}{nearest(name, there)} (known: {known})")
    return name


def with_training(card: Card, checkpoint: Checkpoint) -> Card:
    """Return the card with how far its training had come, where it does not say so."""
    if card.training is not None:
        return card
    try:
        record = TrainingRecord(**checkpoint.record["training"])
    except (KeyError, TypeError, ValidationError):  # a checkpoint of another trainer's
        record = TrainingRecord(steps=checkpoint.step)
    return card.model_copy(update={"training": record})
