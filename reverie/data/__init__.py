"""Sources of images (digits, shapes, folder, idx, npz, hub), batches of them, and the report on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.data.batches import Batch, Batches, split
    from reverie.data.dataset import Dataset, Header, Skipped
    from reverie.data.open import open_dataset
    from reverie.data.options import Options
    from reverie.data.registry import sources
    from reverie.data.report import Report

_PLACES = {
    "Batch": "batches",
    "Batches": "batches",
    "Dataset": "dataset",
    "Header": "dataset",
    "Options": "options",
    "Report": "report",
    "Skipped": "dataset",
    "open_dataset": "open",
    "sources": "registry",
    "split": "batches",
}

__all__ = [
    "Batch",
    "Batches",
    "Dataset",
    "Header",
    "Options",
    "Report",
    "Skipped",
    "open_dataset",
    "sources",
    "split",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the names of the sources cost neither torch nor Pillow."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
