r"""The codec: between pictures and what is denoised, an autoencoder's latents, brought to a variance of about one.

    z' = scale (E(x) - shift),    x = D(z' / scale + shift)                                                  (1)

What is larger than a tile goes through in tiles that overlap, and each pixel is the mean of the tiles that it is in,

    x = sum_i w_i x_i / sum_i w_i,                                                                           (2)

w_i falling to zero towards the sides that tile i shares with others, so that there is no seam; the memory it takes is
that of a tile. A tile's group norms see the tile alone, so that colours may differ a little from those of the whole.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.1 and appendix G
    https://arxiv.org/abs/2112.10752
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn

from reverie.base.errors import ModelFileError, NonFiniteError, UsageError
from reverie.models.card import CodecSpec, sentence
from reverie.networks import networks

TILE = 64  # latents a side: 512 pixels of Stable Diffusion's
OVERLAP = 16
WHOLE = 96  # latents a side that go through at once, unless a tile is asked for


class Codec(nn.Module):
    """An autoencoder with the scale and the shift of its latents.

    Arguments:
        network: Its `encode` gives moments or latents, its `decode` images; `factor` is pixels for a latent's side.
        scale: What makes the latents' variance about one.
        shift: Their mean.
        dtype: What the network computes in, under autocast; None for float32.
        tile: Side of a tile in latents; None for the whole up to 96 a side and tiles of 64 beyond.

    Example:
        >>> spec = CodecSpec(config={"channels": [8, 8], "latent_channels": 4}, scale=0.5)
        >>> codec = build_codec(spec)
        >>> latents = codec.encode(torch.zeros(1, 3, 16, 12))
        >>> latents.shape, codec.decode(latents).shape
        (torch.Size([1, 4, 8, 6]), torch.Size([1, 3, 16, 12]))
    """

    def __init__(
        self,
        network: nn.Module,
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if tile is not None and tile <= OVERLAP:
            raise UsageError(f"tile is {tile}; it must be more than {OVERLAP}, by which tiles overlap")
        self.network, self.scale, self.shift, self.dtype, self.tile = network, scale, shift, dtype, tile

    @property
    def factor(self) -> int:
        """How many pixels a side of one latent stands for."""
        return int(self.network.factor)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self.network.config.in_channels)  # type: ignore[union-attr, arg-type]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.network.config.latent_channels)  # type: ignore[union-attr, arg-type]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the latents of a picture of that size in pixels."""
        return self.latent_channels, -(-height // self.factor), -(-width // self.factor)

    def freeze(self) -> "Codec":
        """Return the codec, never to be trained."""
        self.eval().requires_grad_(False)
        return self

    def encode(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b _ _ _"] | None = None
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the latents of images: (1).

        Arguments:
            images: Images (B, C, H, W) in [-1, 1].
            noise: What the latents are drawn by (B, c, h, w), where there is a distribution; None takes its mean.

        Raises:
            NonFiniteError: They are not finite, in float32 either.
        """

        def numbers(part: Tensor) -> Tensor:
            found = self.network.encode(part)  # type: ignore[operator]
            # A mean beside a logarithm of the variance, so that tiles of both are put together alike.
            return torch.cat([found.mean, found.log_variance], 1) if hasattr(found, "log_variance") else found

        tile = None if self.tile is None else self.tile * self.factor
        limits = self.limits(tile, self.factor)
        z = self.sure(lambda x: tiled(numbers, x, 1, self.factor, limits), images, "the latents")
        if z.shape[1] == 2 * self.latent_channels:
            mean, log_variance = z.chunk(2, 1)
            z = mean if noise is None else mean + (log_variance / 2).exp() * noise.to(mean)
        return self.scale * (z - self.shift)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the images (B, C, h factor, w factor) of latents, about [-1, 1]: (1).

        Raises:
            NonFiniteError: They are not finite, in float32 either.

        Warns:
            RuntimeWarning: They were finite in float32 alone.
        """
        z = latents.float() / self.scale + self.shift
        decode: Callable[[Tensor], Tensor] = self.network.decode  # type: ignore[assignment]
        return self.sure(lambda x: tiled(decode, x, self.factor, 1, self.limits(self.tile, 1)), z, "the picture")

    def limits(self, tile: int | None, unit: int) -> tuple[int, int, int]:
        """Return the side up to which the whole goes through, that of a tile, and the overlap, in some unit."""
        return (WHOLE * unit, TILE * unit, OVERLAP * unit) if tile is None else (tile, tile, OVERLAP * unit)

    def sure(self, call: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
        """Return what a call makes of x, in float32 where it is not finite in less."""
        with nullcontext() if self.dtype is None else torch.autocast(x.device.type, self.dtype):
            y = call(x).float()
        if bool(y.isfinite().all()):
            return y
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            warnings.warn(f"{what} overflowed in {name}; made again in float32", RuntimeWarning, stacklevel=3)
            y = call(x)
        if bad := int((~y.isfinite()).sum()):
            raise NonFiniteError(
                f"{bad} of {y.numel()} numbers of {what} are not finite; the autoencoder or its input is at fault"
            )
        return y


def build_codec(spec: CodecSpec) -> Codec:
    """Return the codec that a card describes, its weights random.

    Raises:
        ModelFileError: Its configuration is none.
    """
    network = networks[spec.name]
    try:
        config = network.Config(**spec.config)
    except ValidationError as error:
        raise ModelFileError(f"its codec is no {spec.name}: {sentence(error)}") from None
    return Codec(network(config), spec.scale, spec.shift)


# Tiles ----------------------------------------------------------------------------------------------


def tiled(
    call: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], up: int, down: int, limits: tuple[int, int, int]
) -> Float[Tensor, "b c2 h2 w2"]:
    """Return what a call makes of x (B, C, H, W), in tiles where it is large: (2).

    Arguments:
        call: Makes an output of `up / down` times the size.
        x: What it is made of.
        up: See there.
        down: See there; tiles begin at multiples of it.
        limits: The side up to which the whole goes through, a tile's side, and the overlap.
    """
    most, side, overlap = limits
    if max(x.shape[2:]) <= most:
        return call(x)
    spans = [cuts(size, side, overlap, down) for size in x.shape[2:]]
    total, weight = torch.empty(0), torch.empty(0)
    for top, bottom in spans[0]:
        for left, right in spans[1]:
            y = call(x[:, :, top:bottom, left:right]).float()
            if not total.numel():
                height, width = (-(-size // down) * up for size in x.shape[2:])
                total, weight = y.new_zeros(*y.shape[:2], height, width), y.new_zeros(height, width)
            rows = ramp(top, bottom, x.shape[2], overlap, up, down).to(y)[: y.shape[2]]
            columns = ramp(left, right, x.shape[3], overlap, up, down).to(y)[: y.shape[3]]
            mask = rows[:, None] * columns
            i, j = top // down * up, left // down * up
            total[:, :, i : i + y.shape[2], j : j + y.shape[3]] += y * mask
            weight[i : i + y.shape[2], j : j + y.shape[3]] += mask
    return total / weight


def cuts(size: int, side: int, overlap: int, unit: int) -> list[tuple[int, int]]:
    """Return where the tiles along one side begin and end: they overlap by so much at the least.

    Example:
        >>> cuts(100, 64, 16, 1), cuts(40, 64, 16, 1)
        ([(0, 64), (36, 100)], [(0, 40)])
    """
    if size <= side:
        return [(0, size)]
    count = math.ceil((size - overlap) / (side - overlap))
    starts = [round(i * (size - side) / (count - 1) / unit) * unit for i in range(count)]
    return [(start, min(start + side, size)) for start in starts[:-1]] + [(starts[-1], size)]


def ramp(start: int, end: int, size: int, overlap: int, up: int, down: int) -> Float[Tensor, " n"]:
    """Return the weight of a tile along one side, in the output's pixels: 1, and less towards a side that it shares."""
    length, width = -(-(end - start) // down) * up, overlap // down * up
    place = torch.arange(length, dtype=torch.float32) + 0.5
    rising = (place / width).clamp(max=1) if start > 0 else torch.ones(length)
    falling = ((length - place) / width).clamp(max=1) if end < size else torch.ones(length)
    return rising * falling
