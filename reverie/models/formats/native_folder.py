"""Our own folder, for models that diffusers has no words for.

reverie.json           the card, and the weights' checksums
weights.safetensors    the weights
README.md              the same for people
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError
from reverie.base.storage import Digest
from reverie.models.checkpoints import safetensors_writer
from reverie.models.formats.base import (
    CARD,
    Contents,
    Format,
    build_unfilled,
    check_sealed,
    check_target,
    refuse_ema,
    seal,
    unseal,
    write_folder,
)
from reverie.models.formats.files import inside
from reverie.models.formats.weights import install
from reverie.models.model import Model
from reverie.models.model_page import model_page

WEIGHTS = "weights.safetensors"


class NativeFolder(Format):
    """Our own folder."""

    name = "native"
    sign = f"a folder with {CARD} and {WEIGHTS}"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and (path / CARD).is_file() and not (path / "model_index.json").exists()

    def read(self, path: Path, ema: str | None = None) -> Model:
        refuse_ema(ema, path)
        sealed = unseal(path)
        if set(sealed.files) != {WEIGHTS}:
            raise ModelFileError(f"{path / CARD} names {', '.join(sealed.files) or 'no files'}, not {WEIGHTS}")
        weights = inside(path, WEIGHTS)
        check_sealed(weights, sealed.files[WEIGHTS])
        denoiser = build_unfilled(sealed.card, str(path))
        install(denoiser.network, [weights], str(weights))
        return Model(denoiser, sealed.card, str(path))

    def describe(self, path: Path) -> dict[str, Any]:
        return {"files": list(unseal(path).files)}

    def inexpressible(self, model: Model) -> str | None:
        return None

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        contents: Contents = {WEIGHTS: safetensors_writer(model.denoiser.network.state_dict())}

        def finish(written: Mapping[str, Digest]) -> Contents:
            return {CARD: seal(model.card, written), "README.md": model_page(model, self.name).encode()}

        check_target(path, self, overwrite, {**contents, "README.md": b""})
        write_folder(path, contents, finish)
