"""What a model format is: how it is recognised, read and written."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from reverie.base import storage
from reverie.base.errors import ModelFileError, UsageError
from reverie.base.storage import Writer, guarded, sync_folder, write_synced
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.models.builders import build
from reverie.models.card import Card, Name, Part, sentence
from reverie.models.formats.files import read_json
from reverie.models.model import Model

CARD = "reverie.json"
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in a folder
Contents = Mapping[str, bytes | Callable[[Writer], None]]


class Format(ABC):
    """A way to keep a model on a disk.

    `name` is what it is called on the command line, `sign` what shows it.
    """

    name: ClassVar[str]
    sign: ClassVar[str]

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Return whether what is at an existing path is of this format, by its content."""

    @abstractmethod
    def read(self, path: Path, ema: str | None = None) -> Model:
        """Return the model at a path that is recognised.

        Arguments:
            path: Where it is.
            ema: Which averaged weights to take, where there are several; "none" for those not averaged.

        Raises:
            ModelFileError: It is damaged, foreign or hostile.
            UsageError: There are no such averaged weights.
        """

    @abstractmethod
    def describe(self, path: Path) -> dict[str, Any]:
        """Return what is at a path that is recognised, beside what its model says of itself."""

    def inexpressible(self, model: Model) -> str | None:
        """Return what of a model this format has no words for; None where it has words for all."""
        return "any model: it is written by training alone"

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        """Write a model that is expressible.

        Raises:
            UsageError: There is something at the path already.
            StorageError: The disk is full, read-only, gone or faulty.
        """
        raise UsageError(f"a {self.name} is written by training alone")


def refuse_ema(ema: str | None, path: Path) -> None:
    """Refuse a choice of averaged weights where there is nothing to choose from."""
    if ema is not None:
        raise UsageError(f"ema is {ema!r}, but {path} holds one set of weights; leave it out")


def build_unfilled(card: Card, where: str) -> NetworkDenoiser:
    """Return the denoiser of a card from a file, its network on the device "meta", without memory.

    Raises:
        ModelFileError: The card names something that is not there, or does not go together.
    """
    try:
        return build(card, "meta")
    except (UsageError, ModelFileError) as error:
        raise ModelFileError(f"{where}: {error}") from None


# The card beside its weights ------------------------------------------------------------------------


class FileDigest(Part):
    """A file as it was written."""

    bytes: int = Field(ge=0)
    crc32: Name
    sha256: Name


class Sealed(Part):
    """reverie.json: the card, and the weights' files as they were written beside it."""

    card: Card
    files: dict[Name, FileDigest]


def seal(card: Card, files: Mapping[str, storage.Digest]) -> bytes:
    """Return reverie.json."""
    sealed = Sealed(card=card, files={name: FileDigest(**asdict(digest)) for name, digest in files.items()})
    return sealed.model_dump_json(indent=1).encode()


def unseal(folder: Path) -> Sealed:
    """Return a folder's reverie.json.

    Raises:
        ModelFileError: It is none, or of a newer version.
    """
    try:
        return Sealed.model_validate(read_json(folder / CARD))
    except ValidationError as error:
        raise ModelFileError(f"{folder / CARD} is no card of a model: {sentence(error)}") from None


def check_sealed(path: Path, digest: FileDigest) -> None:
    """Refuse a file that is not what was written.

    Raises:
        ModelFileError: It differs.
    """
    try:
        found = storage.file_digest(path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}; copy the folder again") from error
    if found.bytes != digest.bytes:
        raise ModelFileError(
            f"{path} has {found.bytes} bytes of {digest.bytes}: it is truncated, or another; copy it again"
        )
    if found.sha256 != digest.sha256:
        raise ModelFileError(
            f"{path} is not what reverie wrote: its checksum differs (a flipped bit, or another program's change); "
            f"copy it again, or delete {CARD} to open the folder as it is"
        )


# Writing a folder -----------------------------------------------------------------------------------


def write_folder(folder: Path, contents: Contents, finish: Callable[[Mapping[str, storage.Digest]], Contents]) -> None:
    """Write a folder whole or not at all: under another name first, fsynced, then renamed.

    Arguments:
        folder: Where; what is there is replaced.
        contents: The files' contents by their names, which may have one folder before them.
        finish: Returns further files, from what was written.

    Raises:
        StorageError: The disk is full, read-only, gone or faulty; what was there before is there still.
    """
    folder = folder.absolute()
    beside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with guarded(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.mkdir()
            digests = fill_folder(beside, contents)
            fill_folder(beside, finish(digests))
            replace_folder(beside, folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(folder.parent)


def fill_folder(folder: Path, contents: Contents) -> dict[str, storage.Digest]:
    """Write files into a folder that nobody reads yet; return what was written."""
    digests = {}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        digests[name] = write_synced(path, content)
    for path in {folder, *((folder / name).parent for name in contents)}:
        sync_folder(path)
    return digests


def replace_folder(new: Path, folder: Path) -> None:
    """Put a folder in the place of another, which goes only after it."""
    if not folder.exists():
        storage.rename(new, folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    storage.rename(folder, old)
    try:
        storage.rename(new, folder)
    except BaseException:
        storage.rename(old, folder)
        raise
    storage.remove_folder(old)


def check_target(path: Path, own: Format, overwrite: bool, files: Contents) -> None:
    """Refuse to write over what is there, unless it is a model of the same format and that is asked for.

    Raises:
        UsageError: There is something at the path already.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file; choose another folder")
    if not own.recognises(path):
        raise UsageError(f"{path} is not empty and holds no {own.name} model; choose another folder")
    if not overwrite:
        raise UsageError(f"{path} holds a model already; choose another folder, or ask to overwrite it")
    known = {CARD, *files}
    there = [p for p in path.rglob("*") if not p.is_dir() and p.name not in LITTER]
    others = [p for p in there if p.relative_to(path).as_posix() not in known]
    if others:
        raise UsageError(
            f"{others[0]} is no part of the model that would be overwritten; move it, or choose another folder"
        )
