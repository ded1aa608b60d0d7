r"""What a model of few steps edits without having been trained for it: zero_shot.py's edits as tasks on pictures.

    inpaint             the pixels that a mask leaves black are known
    colourise           the brightness is known, of a grey picture or of one in colour
    super-resolution    the mean of each block of pixels is known: the small picture
    interpolate         between two samples of the model: between the noises that they were drawn from

Each round of the consistency sampler puts back what is known, so that the result agrees with it; the sampler begins
with noise alone. In interpolating, every noise of the one sample's rounds meets that of the other's at the same share
of the way, so that the ends are the two samples themselves.

References:
    Consistency Models (Song et al., 2023), section 3.3 and appendix D
    https://arxiv.org/abs/2303.01469
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.guidance.zero_shot import Blocks, Grey, Measurement, between
from reverie.models.card import Card

Task = Literal["inpaint", "colourise", "super-resolution", "interpolate"]
TASKS: tuple[str, ...] = get_args(Task)
TURNS, CLOSE = 500, 0.25 / 127.5  # of `within`
# An edit's, where nothing is said: what is put back takes some rounds to be joined to.
ROUNDS = {"steps": 16, "grid": "angle"}


def check_task(card: Card, task: str, masked: bool) -> None:
    """Refuse a task that there is not, that the model can't do, or that its mask does not go with.

    Raises:
        UsageError: So it is.

    Example:
        >>> from reverie.models.card import NetworkSpec, SamplingDefaults
        >>> how = SamplingDefaults(sampler="consistency")
        >>> few = Card(shape=(3, 8, 8), network=NetworkSpec(config={}), sampling=how)
        >>> check_task(few, "colourise", masked=False)
    """
    if task not in TASKS:
        raise UsageError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if card.sampling.sampler != "consistency" or card.kind != "image":
        instead = "; --mask alone inpaints with any model" if task == "inpaint" else ""
        raise UsageError(
            f"task {task} is for consistency models (--objective easy-consistency, consistency, ...); this one is "
            f"sampled by {card.sampling.sampler}{instead}"
        )
    if card.codec is not None:
        raise UsageError(f"task {task} knows pixels, and this is a model of latents")
    if task == "colourise" and card.shape[0] != 3:
        raise UsageError(f"task colourise is for pictures in colour; this model's have {card.shape[0]} channels")
    if masked != (task == "inpaint"):
        said = "needs a mask, white where it is to draw" if task == "inpaint" else "takes no mask; leave it out"
        raise UsageError(f"task {task} {said}")


def factor_of(size: tuple[int, int], card: Card, factor: int | None) -> int:
    """Return how many times as high and wide super-resolution makes a picture: to the model's size, if not said.

    Raises:
        UsageError: It is below 2, or the model's size is no multiple of the picture's.

    Example:
        >>> from reverie.models.card import NetworkSpec
        >>> factor_of((7, 7), Card(shape=(1, 28, 28), network=NetworkSpec(config={})), None)
        4
    """
    height, width = card.shape[1:]
    if factor is None:
        factor = height // size[0]
        if factor < 2 or (factor * size[0], factor * size[1]) != (height, width):
            picture, own = f"{size[1]}x{size[0]}", f"{width}x{height}"
            raise UsageError(f"the picture is {picture}, of which the model's {own} is no multiple; say the factor")
    if factor < 2:
        raise UsageError(f"factor is {factor}; it must be at least 2")
    return factor


@dataclass(frozen=True)
class Known:
    """What is known of a picture.

    Arguments:
        measurement: The linear map.
        y: Its outcome (1, ...).
    """

    measurement: Measurement
    y: Tensor

    @property
    def picture(self) -> Float[Tensor, "c h w"]:
        """The shortest picture with that outcome (C, H, W)."""
        return self.measurement.spread(self.y)[0]


def known_of(task: str | None, image: Float[Tensor, "c h w"], factor: int) -> Known | None:
    """Return what a task knows of a picture (C, H, W) in [-1, 1]; None where a mask says it.

    Example:
        >>> known_of("super-resolution", torch.ones(1, 2, 2), 2).picture.shape
        torch.Size([1, 4, 4])
    """
    if task == "colourise":
        grey = Grey()
        return Known(grey, grey.measure(image[None]))
    if task == "super-resolution":
        return Known(Blocks(factor), factor * image[None])
    return None


def within(known: Known, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Return pictures within [-1, 1] that agree with what is known, near those given: projected on both in turns.

    Each turn alone undoes some of the other. They end where the pictures agree to a quarter of one of 255 levels, or
    after 500 turns: what no picture within the range has cannot be agreed with.

    Example:
        >>> known = known_of("super-resolution", torch.full((1, 1, 1), -0.9), 2)
        >>> made = within(known, torch.tensor([[[[3.0, -1.0], [-1.0, -1.0]]]]))
        >>> round(float(made.mean()), 2), float(made.min())
        (-0.9, -1.0)
    """
    images = images.clamp(-1, 1)
    for _ in range(TURNS):
        if agreement(known, images) < CLOSE:
            break
        images = known.measurement.put(images, known.y).clamp(-1, 1)
    return images


def agreement(known: Known, images: Float[Tensor, "n c h w"]) -> float:
    """Return by how much pictures are off what is known of them at most, as the measurement counts it.

    Example:
        >>> known = known_of("super-resolution", torch.ones(1, 2, 2), 2)
        >>> agreement(known, torch.ones(3, 1, 4, 4))
        0.0
    """
    return float((known.measurement.measure(images) - known.y).abs().max())


@dataclass(frozen=True)
class Between(Noise):
    """Noise on the great circle between that of two seeds.

    Arguments:
        seeds: The first seed, for each sample (B,).
        other: The second.
        shares: How far each sample is on its way (B,), in [0, 1]: 0 is the first's noise, 1 the second's.

    Example:
        >>> same = Between([3, 3], 4, [0.0, 1.0])((2,), [1, 1])
        >>> bool(torch.equal(same, torch.cat([Noise([3])((2,), [1]), Noise([4])((2,), [1])])))
        True
    """

    other: int = 0
    shares: Sequence[float] = ()

    def __call__(self, shape: Sequence[int], draws: Sequence[int]) -> Float[Tensor, "b ..."]:
        first = super().__call__(shape, draws)
        second = Noise([self.other] * len(self.seeds))(shape, draws)
        share = torch.tensor(self.shares, dtype=first.dtype)
        mixed = between(first, second, share)
        ends = share.reshape(-1, *[1] * (first.ndim - 1))
        return torch.where(ends <= 0, first, torch.where(ends >= 1, second, mixed))  # the ends to the last bit

    def rows(self, index: Sequence[int]) -> "Between":
        return Between([self.seeds[i] for i in index], self.other, [self.shares[i] for i in index])


def shares(n: int) -> list[float]:
    """Return n places on the way, its ends among them.

    Example:
        >>> shares(3)
        [0.0, 0.5, 1.0]
    """
    if n < 2:
        raise UsageError(f"n is {n}; an interpolation has at least 2 pictures, its ends")
    return [i / (n - 1) for i in range(n)]
