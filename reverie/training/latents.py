r"""Data as latents: each picture encoded once, before training.

    z' = scale (z - shift),    shift = mean z,    scale = 1 / std z,                                       (1)

over all numbers of all latents z of the data, rounded to four digits; of a codec with a distribution z is its mean.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.1 and appendix G
    https://arxiv.org/abs/2112.10752
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.storage import write_file
from reverie.data.dataset import Dataset
from reverie.models.card import CodecSpec
from reverie.models.checkpoints import safetensors_writer
from reverie.models.codec import Codec
from reverie.models.formats.codec_file import spec_of
from reverie.models.formats.weights import read_header, read_tensors

CACHE = "latents.safetensors"
BATCH = 16  # pictures that are encoded together
MOST = 64 << 30  # bytes


class Latents(Dataset):
    """A data set's latents, which are floats; all else is the data set's.

    Arguments:
        pictures: The data.
        codec: What encodes it.
        mirrored: Whether the latents of the pictures' mirror images are wanted too.
        cache: A file in which they may be.
        say: Called with what is being done.

    Raises:
        UsageError: The pictures are of other channels, or of a size that the codec does not divide; or there are too
            many.
    """

    def __init__(
        self,
        pictures: Dataset,
        codec: Codec,
        mirrored: bool = False,
        cache: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.pictures, self.codec = pictures, codec
        self.name, self.classes, self.preparation = pictures.name, pictures.classes, pictures.preparation
        self.skipped, self.notes = pictures.skipped, pictures.notes
        self.__dict__["fingerprint"] = pictures.fingerprint
        channels, height, width = pictures.shape
        wanted, factor = codec.channels, codec.factor
        if channels != wanted:
            raise UsageError(f"the codec encodes {wanted} channels; {self.name} as it is read here has {channels}")
        if height % factor or width % factor:
            raise UsageError(
                f"the codec needs sides of a multiple of {factor}; {self.name} is {height}x{width}: set --size"
            )
        self.shape = (codec.latent_channels, height // factor, width // factor)
        copies = 2 if mirrored else 1
        size = 4 * copies * len(pictures) * self.shape[0] * self.shape[1] * self.shape[2]
        if size > MOST:
            raise UsageError(f"the latents of {len(pictures)} pictures take {size >> 30} GiB; use fewer, with --limit")
        self.key = key_of(pictures, codec, copies)
        found = None if cache is None else cached(cache, self.key)
        if found is None:
            say(f"encoding {len(pictures)} pictures to latents of {'x'.join(map(str, self.shape))}")
            found = torch.stack([self.encoded(turned) for turned in (False, True)[:copies]])
        self.raw: Tensor = found

    @torch.no_grad()
    def encoded(self, mirrored: bool) -> Float[Tensor, "n c h w"]:
        """Return the latents of all pictures, as the codec's network makes them."""
        device = next(self.codec.parameters()).device
        plain = Codec(self.codec.network, dtype=self.codec.dtype)
        parts = []
        for start in range(0, len(self), BATCH):
            images = self.pictures.images(range(start, min(start + BATCH, len(self)))).float() / 127.5 - 1
            parts.append(plain.encode((images.flip(-1) if mirrored else images).to(device)).cpu())
        return torch.cat(parts)

    def measure(self) -> CodecSpec:
        """Give the codec the scale and the shift that these latents have, and return what a card says of it.

        Raises:
            UsageError: All latents are the same.
        """
        values = self.raw[0].double()
        std = float(values.std())
        if not std > 1e-6:
            raise UsageError(f"the latents of {self.name} are all the same; take another codec, or other data")
        self.codec.scale, self.codec.shift = float(f"{1 / std:.4g}"), float(f"{float(values.mean()):.4g}")
        return spec_of(self.codec)

    def write(self, cache: Path) -> None:
        """Write the latents to a file that `cache` reads."""
        writer = safetensors_writer({"latents": self.raw}, {"key": self.key})
        write_file(cache, writer, self.raw.nbytes)

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, indices: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Return the latents (B, c, h, w) of some samples: equation (1)."""
        return self.scaled(self.raw[0, list(indices)])

    def turned(self, indices: Sequence[int], mirrored: Tensor) -> Float[Tensor, "b c h w"]:
        """Return the latents of some samples, or of the mirror image where that is asked for (B,)."""
        return self.scaled(self.raw[mirrored.long(), list(indices)])

    def scaled(self, z: Tensor) -> Tensor:
        """Return latents of a mean of about zero and a variance of about one."""
        return self.codec.scale * (z - self.codec.shift)

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"] | None:
        """Return the classes (B,) of some samples."""
        return self.pictures.labels(indices)

    def caption(self, index: int) -> str | None:
        """Return a sample's text."""
        return self.pictures.caption(index)

    def digest(self, index: int) -> bytes:
        """Return the picture's hash."""
        return self.pictures.digest(index)


def key_of(pictures: Dataset, codec: Codec, copies: int) -> str:
    """Return what latents are a function of, as a hash: the data, how it is read, and the codec's weights."""
    parts = (pictures.fingerprint, pictures.shape, pictures.preparation, spec_of(codec).digest, copies)
    return sha256(repr(parts).encode()).hexdigest()


def cached(path: Path, key: str) -> Tensor | None:
    """Return the latents in a file, if they are those of a key."""
    if not path.is_file() or read_header(path).metadata.get("key") != key:
        return None
    return read_tensors(path, ["latents"])["latents"]
