"""A model's card, written anew where the model lies; its weights stay as they are."""

from collections.abc import Sequence
from pathlib import Path

from reverie.base.errors import UsageError
from reverie.base.storage import write_file
from reverie.models.card import Card, FittedSolver, read_card
from reverie.models.formats.base import CARD as SEALED
from reverie.models.formats.base import unseal
from reverie.models.formats.run_folder import CARD


def store_solvers(path: Path | str, solvers: Sequence[FittedSolver]) -> Path:
    """Keep fitted solvers in the card of the model at a path; one of as many steps and the same guidance is replaced.

    Arguments:
        path: A run, or a folder that reverie wrote.
        solvers: What `tune_model` found.

    Returns:
        The file that was written.

    Raises:
        UsageError: The model there has no card of reverie's.
        ModelFileError: The card is damaged.
        StorageError: It cannot be written.
    """
    folder = Path(path)
    if (folder / CARD).is_file():
        card = with_solvers(read_card(folder / CARD), solvers)
        write_file(folder / CARD, card.model_dump_json(indent=1).encode())
        return folder / CARD
    if (folder / SEALED).is_file():
        sealed = unseal(folder)
        sealed = sealed.model_copy(update={"card": with_solvers(sealed.card, solvers)})
        write_file(folder / SEALED, sealed.model_dump_json(indent=1).encode())
        return folder / SEALED
    raise UsageError(f"{path} has no card of reverie's to keep a solver in; save the model by rv.save first")


def with_solvers(card: Card, solvers: Sequence[FittedSolver]) -> Card:
    """Return a card with some more fitted solvers."""
    new = {(solver.steps, solver.guidance) for solver in solvers}
    kept = [solver for solver in card.sampling.fitted if (solver.steps, solver.guidance) not in new]
    fitted = tuple(sorted([*kept, *solvers], key=lambda solver: (solver.steps, solver.guidance or 0.0)))
    return card.model_copy(update={"sampling": card.sampling.model_copy(update={"fitted": fitted})})
