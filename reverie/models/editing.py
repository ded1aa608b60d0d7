r"""Editing a picture: what is drawn does not start from noise alone, or not everywhere.

    x_t = alpha_t x_0 + sigma_t eps  at  t = strength                                                       (1)

A strength of 0 leaves the picture as it is, one of 1 starts from noise; the steps asked for are the steps taken,
between t = strength and 0. With a mask, what is outside of it comes back as it was, to the last bit. Outpainting is
that on a larger canvas: the picture continued by its border, and a mask of what was added.

References:
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et al., 2022)
    https://arxiv.org/abs/2108.01073
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 4.5
    https://arxiv.org/abs/2112.10752
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from reverie.base.errors import DataError, UsageError
from reverie.data.decode import BadImage, to_eight_bits
from reverie.models.codec import Codec
from reverie.models.tasks import Known, known_of

Picture = Image.Image | Path | str | Tensor
MAX_PIXELS = 1 << 26
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class Original:
    """A picture to be edited, and where.

    Arguments:
        pixels: The picture (C, H, W), as it was given.
        mask: Where it is to be made anew (H, W), 0..1; None for everywhere.
        source: The picture's path, if it had one.
        mask_source: The mask's.
        task: What is done with it by a model of few steps (tasks.py); None for an edit by any model.
        factor: How many times as high and wide the result is, of super-resolution.
        outpaint: What was added to the left, the top, the right and the bottom; None for nothing.
        faded: Whether it was in colour, and the model's pictures are grey.
    """

    pixels: UInt8[Tensor, "c h w"]
    mask: Float[Tensor, "h w"] | None = None
    source: str | None = None
    mask_source: str | None = None
    task: str | None = None
    factor: int = 1
    outpaint: tuple[int, int, int, int] | None = None
    faded: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes of it."""
        return self.factor * self.pixels.shape[1], self.factor * self.pixels.shape[2]

    def record(self) -> dict[str, Any]:
        """Return which picture, which mask and which task, as JSON holds it."""
        seen = None if self.mask is None else digest((255 * self.mask).round().to(torch.uint8))
        image = {"image": self.source, "image_sha256": digest(self.pixels)}
        added = None if self.outpaint is None else list(self.outpaint)
        what = {"task": self.task, "factor": self.factor, "outpaint": added}
        return {**image, "mask": self.mask_source, "mask_sha256": seen, **what}

    def check_mask(self) -> None:
        """Refuse a mask that draws nothing, and one whose other parts could not come back as they were.

        Raises:
            UsageError: It is so.
        """
        if self.mask is None:
            return
        if not self.mask.any():
            raise UsageError("the mask is black everywhere, so that nothing would be drawn; make white what is to be")
        if self.faded:
            raise UsageError(
                "the picture is in colour and this model's are grey: what the mask leaves could not come back as it "
                "was; make it grey first"
            )

    def pasted(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return images in [-1, 1] with the picture put back where the mask is zero, and mixed where it is between."""
        if self.mask is None:
            return images
        return torch.lerp(self.pixels.float() / 127.5 - 1, images, self.mask)


@dataclass(frozen=True)
class Given:
    """What the samples start from, in the space that is denoised.

    Arguments:
        x0: The picture, or its latents (C, h, w).
        mask: Where it is to be made anew (h, w); None for everywhere.
        beside: What a network that was trained to fill in sees beside its input (1 + C, h, w); None for others.
        known: What a task knows of the picture, but for a mask.
    """

    x0: Float[Tensor, "c h w"]
    mask: Float[Tensor, "h w"] | None = None
    beside: Float[Tensor, "k h w"] | None = None
    known: Known | None = None


def digest(pixels: Tensor) -> str:
    """Return the sha256 of a picture's shape and pixels."""
    return sha256(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()).hexdigest()


def read_original(image: Picture, mask: Picture | None, channels: int) -> Original:
    """Return a picture and its mask.

    Arguments:
        image: A path, a Pillow image, or a tensor (C, H, W) of uint8, or of floats in [-1, 1].
        mask: The same, of the picture's size: white where it is to be made anew. None for everywhere; a picture with
            transparency and no mask is made anew where it is transparent.
        channels: Of the model's pictures.

    Raises:
        UsageError: There is no such file, or the sizes differ.
        DataError: A file is no picture, or is too large.
    """
    source, mask_source = (str(p) if isinstance(p, str | Path) else None for p in (image, mask))
    pixels, alpha, faded = as_pixels(image, channels)
    if mask is None:
        return Original(pixels, None if alpha is None else 1 - alpha, source, faded=faded)
    shown, *_ = as_pixels(mask, 1)
    if shown.shape[1:] != pixels.shape[1:]:
        sizes = " and ".join(f"{s.shape[2]}x{s.shape[1]}" for s in (pixels, shown))
        raise UsageError(f"the picture and its mask are {sizes}; the mask must be of the picture's size")
    return Original(pixels, shown[0].float() / 255, source, mask_source, faded=faded)


def outpainted(original: Original, sides: int | Sequence[int]) -> Original:
    """Return a picture on a larger canvas, what was added to be made anew.

    Arguments:
        original: The picture.
        sides: Pixels to add to the left, the top, the right and the bottom, or one number for all.

    Raises:
        UsageError: That is not what they are, they add nothing, or the canvas is too large.

    Example:
        >>> whole = outpainted(Original(torch.zeros(3, 4, 5, dtype=torch.uint8)), (2, 0, 1, 3))
        >>> whole.size, int(whole.mask.sum())
        ((7, 8), 36)
    """
    given = (sides,) * 4 if isinstance(sides, int) else tuple(sides)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given)
    if len(given) != 4 or not whole or not any(given):
        raise UsageError(f"outpaint is {sides}; it must be pixels to add: left,top,right,bottom, or one number for all")
    left, top, right, bottom = given
    height, width = original.size[0] + top + bottom, original.size[1] + left + right
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"outpaint {sides} makes a picture of {width}x{height}, which is more than {MAX_PIXELS} pixels"
        )
    edges = (left, right, top, bottom)
    pixels = F.pad(original.pixels[None].float(), edges, mode="replicate")[0].to(torch.uint8)
    mask = torch.zeros(original.size) if original.mask is None else original.mask
    return replace(original, pixels=pixels, mask=F.pad(mask, edges, value=1.0), outpaint=(left, top, right, bottom))


def as_pixels(image: Picture, channels: int) -> tuple[UInt8[Tensor, "c h w"], Float[Tensor, "h w"] | None, bool]:
    """Return a picture's pixels, its opacity 0..1 where any of it is transparent, and whether colour became grey."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
            raise UsageError(f"the picture is {tuple(image.shape)}; it must be ({channels}, H, W)")
        whole = image if image.dtype == torch.uint8 else (127.5 * image + 127.5).round().clamp(0, 255).to(torch.uint8)
        return whole.cpu(), None, False
    picture = image if isinstance(image, Image.Image) else opened(Path(image))
    if picture.width * picture.height > MAX_PIXELS:
        raise DataError(f"a picture of {picture.width}x{picture.height} is more than {MAX_PIXELS} pixels")
    try:
        picture = to_eight_bits(turned(picture))
    except BadImage as error:
        raise DataError(f"{'the picture' if isinstance(image, Image.Image) else image}: {error}") from None
    clear = picture.convert("RGBA").getchannel("A") if picture.mode in ("RGBA", "LA", "P", "PA") else None
    alpha = None if clear is None else torch.from_numpy(np.asarray(clear).copy()).float() / 255
    pixels = np.asarray(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    tensor = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels).copy()).permute(2, 0, 1).contiguous()
    seen = None if alpha is None or channels == 4 or bool((alpha == 1).all()) else alpha
    return tensor, seen, channels == 1 and in_colour(picture)


def in_colour(picture: Image.Image) -> bool:
    """Whether any pixel of a picture is other than grey."""
    colours = np.asarray(picture.convert("RGB"))
    return bool((colours != colours[..., :1]).any())


def turned(picture: Image.Image) -> Image.Image:
    """Return a picture as its EXIF orientation wants it seen."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture) or picture


def opened(path: Path) -> Image.Image:
    """Return the picture in a file, its size looked at before its pixels are."""
    if not path.is_file():
        raise UsageError(f"there is no picture {path}; check the path")
    try:
        picture = Image.open(path, formats=FORMATS)
        if picture.width * picture.height <= MAX_PIXELS:
            picture.load()
        return picture
    except UnidentifiedImageError:
        raise DataError(f"{path} is no picture that is read here ({', '.join(FORMATS)})") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def padded_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return a size rounded up to multiples of a factor.

    Example:
        >>> padded_size((13, 16), 8)
        (16, 16)
    """
    return -(-size[0] // factor) * factor, -(-size[1] // factor) * factor


def give(original: Original, codec: Codec | None, device: torch.device, fills: bool) -> Given:
    """Return what samples start from: the picture, or its latents.

    Arguments:
        original: The picture, which is continued by its border to whole latents.
        codec: What makes latents of it; None where pictures are denoised.
        device: Where the codec computes.
        fills: The network was trained to fill in, and sees mask and picture beside its input.
    """
    if known := known_of(original.task, original.pixels.float() / 127.5 - 1, original.factor):
        return Given(known.picture, known=known)
    factor = codec.factor if codec else 1
    height, width = padded_size(original.size, factor)
    edges = (0, width - original.size[1], 0, height - original.size[0])
    images = F.pad(original.pixels[None].float() / 127.5 - 1, edges, mode="replicate")
    x0 = encoded(images, codec, device)
    if original.mask is None:
        return Given(x0)
    mask = F.pad(original.mask[None, None], edges, mode="replicate")
    # A latent is made anew where any pixel of it is.
    small = F.max_pool2d((mask > 0).float(), factor)[0, 0]
    if not fills:
        return Given(x0, small)
    seen = encoded(images * (mask < 0.5), codec, device)
    return Given(x0, small, torch.cat([(F.interpolate(mask, small.shape) >= 0.5).float()[0], seen]))


def encoded(images: Float[Tensor, "1 c h w"], codec: Codec | None, device: torch.device) -> Float[Tensor, "_ _ _"]:
    """Return a picture (C, H, W), or its latents (c, h, w), on the CPU."""
    if codec is None:
        return images[0]
    with torch.no_grad():
        return codec.encode(images.to(device))[0].cpu()
