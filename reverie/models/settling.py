"""What may be asked of a model beside its sampler and grid, each settled and checked by its name."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import MAX_SEED
from reverie.base.registry import nearest
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.models.card import Card
from reverie.models.guiding import finite
from reverie.models.speed import Speed

# Rows of a network call in exact mode: as many as make BUCKET_PIXELS pixels, a power of two, MAX_ROWS at
# most. Changing either changes the last bits of every picture.
BUCKET_PIXELS = 8192
MAX_ROWS = 32

BATCH_NUMBERS = 1 << 20  # numbers of a batch where no batch size is asked for
MAX_SAMPLES = 10_000_000
MAX_SIDE = 1 << 16
MAX_PROMPT = 1 << 20  # characters
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bucket_rows(shape: Sequence[int]) -> int:
    """Return how many rows a network call has in exact mode, for samples of that shape.

    Example:
        >>> bucket_rows((1, 8, 8)), bucket_rows((3, 32, 32)), bucket_rows((3, 256, 256)), bucket_rows((2,))
        (32, 8, 1, 32)
    """
    pixels = math.prod(shape[1:])
    rows = min(max(BUCKET_PIXELS // pixels, 1), MAX_ROWS)
    return 1 << (rows.bit_length() - 1)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number that was asked for, having refused what is none or out of range."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) <= most:
        raise UsageError(f"{name} is {value!r}; it must be a whole number in {least}..{most}")
    return int(value)


def settle_seeds(n: int, seed: int | Sequence[int]) -> tuple[int, ...]:
    """Return the seed of each sample: seed, seed + 1, ... or those given."""
    n = whole("n, the number of samples,", n, 1, MAX_SAMPLES)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != n:
            raise UsageError(f"there are {len(seed)} seeds for {n} samples; give one for each, or a single one")
        return tuple(whole("a seed", s, 0, MAX_SEED) for s in seed)
    first = whole("seed", seed, 0, MAX_SEED)
    if first + n - 1 > MAX_SEED:
        raise UsageError(f"seed is {first}; with n = {n} it must be at most {MAX_SEED - n + 1}")
    return tuple(range(first, first + n))


def settle_labels(card: Card, n: int, classes: int | str | Sequence[int | str] | None) -> tuple[int, ...] | None:
    """Return the label of each sample; None for a model without classes."""
    if not card.classes:
        if classes is not None:
            raise UsageError(f"class {classes!r} was asked for, but this model has no classes; leave it out")
        return None
    if classes is None:
        if not card.unconditional:
            raise UsageError(f"this model needs a class, one of {names(card)}")
        return (card.null_label,) * n
    if isinstance(classes, Tensor | np.ndarray):
        classes = classes.tolist()
    if isinstance(classes, Sequence) and not isinstance(classes, str):
        if len(classes) != n:
            raise UsageError(f"there are {len(classes)} classes for {n} samples; give one for each, or a single one")
        return tuple(find_class(card, value) for value in classes)
    return (find_class(card, classes),) * n


def settle_prompts(
    card: Card, n: int, prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, guidance: float | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return the prompt of each sample, and what each is guided away from; None for a model that takes none."""
    if card.text is None:
        for name, value in (("prompt", prompt), ("negative_prompt", negative)):
            if value is not None:
                hint = "; it has classes: ask for one of them" if card.classes else ""
                raise UsageError(f"{name} {str(value)[:60]!r} was given, but this model takes no prompts{hint}")
        return None, None
    if negative is not None and guidance in (None, 0.0, 1.0):
        raise UsageError(f"negative_prompt has no effect at guidance {guidance}; give a prompt and another guidance")
    return settle_texts("prompt", n, prompt), settle_texts("negative_prompt", n, negative)


def settle_texts(name: str, n: int, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return one text for each sample, the empty one where none is given."""
    texts = (given or "",) * n if given is None or isinstance(given, str) else tuple(given)
    if len(texts) != n:
        raise UsageError(f"there are {len(texts)} texts in {name} for {n} samples; give one for each, or a single one")
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_PROMPT or "\0" in text:
            raise UsageError(
                f"{name} is {str(text)[:40]!r}; it must be text without NUL, {MAX_PROMPT} characters at most"
            )
    return texts


def find_class(card: Card, value: int | str) -> int:
    """Return the label of a class given by its name or its index.

    Raises:
        UsageError: There is none; the message lists those there are.
    """
    if isinstance(value, str) and value in card.classes:
        return card.classes.index(value)
    index = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if hasattr(index, "__index__") and not isinstance(index, bool | str) and 0 <= int(index) < len(card.classes):
        return int(index)
    hint = nearest(value, card.classes) if isinstance(value, str) else ""
    raise UsageError(f"there is no class {value!r}{hint} (known: {names(card)})")


def names(card: Card, shown: int = 20) -> str:
    """Return the names of a card's classes, the first of them if they are many."""
    more = f" and {len(card.classes) - shown} more" if len(card.classes) > shown else ""
    return ", ".join(card.classes[:shown]) + more


def settle_guidance(card: Card, asked: bool, guidance: float | None) -> float | None:
    """Return w, or None where there is no class to guide to."""
    if guidance is None:
        return (card.sampling.guidance if card.guidable else 1.0) if asked else None
    w = finite("guidance", guidance)
    if not card.classes and card.text is None:
        raise UsageError(f"guidance is {w}, but this model has no classes to guide to; leave it out")
    if not asked:
        wanted = "no prompt is given; give one" if card.text else "no class is asked for; name one"
        raise UsageError(f"guidance is {w}, but {wanted}, or leave guidance out")
    if w != 1 and not card.guidable:
        raise UsageError(f"guidance is {w}, but this model has no label for no class; only 1 is possible")
    return w


def settle_clipping(
    card: Card, clip: bool | float | None, threshold: float | None
) -> tuple[float | None, float | None]:
    """Return the quantile of dynamic thresholding and the limit of x_0, each None for none."""
    if clip is None and threshold is None:
        clip, threshold = card.sampling.clip, card.sampling.threshold
    if clip is None:
        clip = (card.kind == "image" and card.codec is None) or threshold is not None
    limit = 1.0 if clip is True else None if clip is False else finite("clip", clip)
    if limit is not None and limit <= 0:
        raise UsageError(f"clip is {limit}; it must be positive (the limit of x_0), or False")
    if threshold is None:
        return None, limit
    quantile = finite("threshold", threshold)
    if not 0 < quantile <= 1:
        raise UsageError(f"threshold is {quantile}; it is a quantile and must lie in (0, 1]")
    if limit is None:
        raise UsageError(f"threshold is {quantile}, but clip is off; thresholding needs the limit that clip gives")
    return quantile, limit


def settle_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the network's dtype; None is float32."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def settle_arithmetic(denoiser: NetworkDenoiser, dtype: str | torch.dtype | None, speed: Speed) -> torch.dtype | None:
    """Return what the network computes in: as asked, or as the model does; a fast one as it was made."""
    if dtype is None:
        return denoiser.dtype
    found = settle_dtype(dtype)
    if speed.packed and found != speed.dtype:
        raise UsageError(
            f"dtype is {dtype}, but the model was loaded with speed fast for another; load it with that dtype"
        )
    return found


def settle_exact(exact: bool | None, speed: Speed) -> bool:
    """Return whether a sample's bits are to be its own: unless the model is fast, or it was said otherwise."""
    if exact and speed.name == "fast":
        raise UsageError("exact is asked for of a model that was loaded with speed fast; load it with speed exact")
    return speed.name == "exact" if exact is None else bool(exact)


def settle_strength(strength: float) -> float:
    """Return the time that an edit starts from."""
    value = finite("strength", strength)
    if not 0 < value <= 1:
        raise UsageError(f"strength is {value}; it must be in (0, 1]: the time that the picture is taken back to")
    return value


def settle_size(card: Card, size: int | Sequence[int] | None, factor: int) -> tuple[int, int]:
    """Return the pictures' height and width: as asked for, or as the model's; (0, 0) where samples are no pictures."""
    if card.kind != "image":
        if size is not None:
            raise UsageError(f"size is {size}, but this model's samples are no pictures; leave it out")
        return (0, 0)
    if size is None:
        return card.shape[1] * factor, card.shape[2] * factor
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise UsageError(f"size is {size}; it must be one number, or height and width")
    height, width = (whole("a side of size", side, 1, MAX_SIDE) for side in sides)
    if height % factor or width % factor:
        near = "x".join(str(max(factor, round(side / factor) * factor)) for side in (height, width))
        raise UsageError(f"size is {height}x{width}; each side must be a multiple of {factor}: the nearest is {near}")
    return height, width


def settle_batch_size(shape: Sequence[int], n: int, batch_size: int | None) -> int:
    """Return how many samples go together: as asked, or what a million numbers allow, in whole buckets."""
    if batch_size is not None:
        return min(whole("batch_size", batch_size, 1, MAX_SAMPLES), n)
    rows = bucket_rows(shape)
    return min(n, max(rows, min(64, BATCH_NUMBERS // math.prod(shape)) // rows * rows))


def settle_kept(intermediates: int | Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the steps after which the state is kept: those given, or so many, evenly spaced, the last among them."""
    if isinstance(intermediates, Sequence):
        return tuple(sorted({whole("a step in intermediates", k, 1, steps) for k in intermediates}))
    count = whole("intermediates", intermediates, 0, steps)
    return tuple(steps * (i + 1) // count for i in range(count))
