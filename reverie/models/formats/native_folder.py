"""Our own folder, for models that diffusers has no words for.

reverie.json           the card, and the weights' checksums
weights.safetensors    the weights
codec.safetensors      those of the codec, where it is latents that are denoised
README.md              the same for people
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie.base.errors import ModelFileError
from reverie.base.storage import Digest
from reverie.models.card import ClipSpec
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
from reverie.models.formats.codec_file import CODEC, beside, codec_contents
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
        names = (WEIGHTS,) if sealed.card.codec is None else (WEIGHTS, CODEC)
        if set(sealed.files) != set(names):
            raise ModelFileError(f"{path / CARD} names {', '.join(sealed.files) or 'no files'}, not {', '.join(names)}")
        for name in names:
            check_sealed(inside(path, name), sealed.files[name])
        weights = inside(path, WEIGHTS)
        denoiser = build_unfilled(sealed.card, str(path))
        install(denoiser.network, [weights], str(weights))
        return Model(denoiser, sealed.card, str(path), codec=beside(path, sealed.card))

    def describe(self, path: Path) -> dict[str, Any]:
        return {"files": list(unseal(path).files)}

    def inexpressible(self, model: Model) -> str | None:
        return "the text encoders of CLIP" if isinstance(model.card.text, ClipSpec) else None

    def write(self, model: Model, path: Path, overwrite: bool = False) -> None:
        weights = {WEIGHTS: safetensors_writer(model.denoiser.network.state_dict())}
        contents: Contents = {**weights, **codec_contents(model.codec)}

        def finish(written: Mapping[str, Digest]) -> Contents:
            return {CARD: seal(model.card, written), "README.md": model_page(model, self.name).encode()}

        check_target(path, self, overwrite, {**contents, "README.md": b""})
        write_folder(path, contents, finish)
