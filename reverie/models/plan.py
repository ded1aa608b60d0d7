"""What is asked of a model, settled in every detail and checked, before anything is computed."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import MAX_SEED
from reverie.base.registry import nearest
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.grids import from_times, from_timesteps
from reverie.diffusion.registry import grids, samplers
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.consistency import MeanFlow
from reverie.diffusion.samplers.learned import Learned
from reverie.diffusion.schedules import Schedule, Table
from reverie.models.automatic import AUTO, choose
from reverie.models.card import Card
from reverie.models.guiding import UNGUIDED, Guiding, Worse, count_within, finite, settle_guiding
from reverie.models.reuse import settle_reuse
from reverie.models.speed import EXACT, Speed

# Rows of a network call in exact mode: as many as make BUCKET_PIXELS pixels, a power of two, MAX_ROWS at
# most. Changing either changes the last bits of every picture.
BUCKET_PIXELS = 8192
MAX_ROWS = 32

BATCH_NUMBERS = 1 << 20  # numbers of a batch where no batch size is asked for
MAX_SAMPLES = 10_000_000
MAX_SIDE = 1 << 16
MAX_PROMPT = 1 << 20  # characters
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = (
    "seed",
    "classes",
    "prompt",
    "negative_prompt",
    "sampler",
    "steps",
    "grid",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "perturbed",
    "auto_guidance",
    "bad",
    "clip",
    "threshold",
    "size",
    "batch_size",
    "exact",
    "dtype",
    "cache_every",
    "upscale",
    "upscale_strength",
)


def bucket_rows(shape: Sequence[int]) -> int:
    """Return how many rows a network call has in exact mode, for samples of that shape.

    Example:
        >>> bucket_rows((1, 8, 8)), bucket_rows((3, 32, 32)), bucket_rows((3, 256, 256)), bucket_rows((2,))
        (32, 8, 1, 32)
    """
    pixels = math.prod(shape[1:])
    rows = min(max(BUCKET_PIXELS // pixels, 1), MAX_ROWS)
    return 1 << (rows.bit_length() - 1)


# The plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingPlan:
    """What will run, settled in every detail.

    Arguments:
        shape: The shape of one sample.
        seeds: The seed of each sample.
        labels: The label of each; None for a model without classes.
        null_label: The label for no class, where there is one.
        sampler_name: The sampler's name in the registry.
        sampler: The sampler.
        grid_name: The grid's name; "times" for one that was given as such, "own" for a fitted solver's.
        grid_options: The grid's options.
        grid: Its times (N + 1,), the last one 0.
        guidance: w of classifier-free guidance; None where no class and no prompt is asked for.
        clip: The limit of x_0; None for none.
        threshold: The quantile of dynamic thresholding; None for none.
        dtype: The network's dtype; None for float32.
        exact: Whether the bits of a sample are to depend on the model, the settings and its seed alone.
        batch_size: Samples that go through the steps together.
        calls: How often the sampler asks the denoiser.
        kept: The steps after which the state is kept.
        guidance_told: Whether the network is told w as a number, and asked once.
        prompts: The prompt of each sample; None for a model that takes none.
        negatives: What each is guided away from; None for a model that takes no prompts.
        size: Height and width of the pictures in pixels; (0, 0) where samples are no pictures.
        strength: The time that an edit starts from; None for samples from noise.
        guiding: The guidance beside w.
        guided_calls: At how many of the calls there is guidance; all of them, where no interval is asked for.
        speed: How the model computes.
        cache_every: At every how many-th call all of the network is asked.
        second: The pass that follows at a larger size; None for none.
    """

    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    null_label: int | None
    sampler_name: str
    sampler: Sampler
    grid_name: str
    grid_options: dict[str, float | int]
    grid: Float[Tensor, " n"]
    guidance: float | None
    clip: float | None
    threshold: float | None
    dtype: torch.dtype | None
    exact: bool
    batch_size: int
    calls: int
    kept: tuple[int, ...] = ()
    guidance_told: bool = False
    prompts: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    size: tuple[int, int] = (0, 0)
    strength: float | None = None
    guiding: Guiding = UNGUIDED
    guided_calls: int | None = None
    speed: Speed = EXACT
    cache_every: int = 1
    second: "SamplingPlan | None" = None

    @property
    def n(self) -> int:
        """How many samples."""
        return len(self.seeds)

    @property
    def steps(self) -> int:
        """The steps that each sample takes."""
        return len(self.grid) - 1

    @property
    def guided(self) -> bool:
        """Whether guidance asks the network twice: with the class or prompt and without."""
        return not self.guidance_told and self.guidance is not None and self.guidance not in (0.0, 1.0)

    @property
    def evaluations(self) -> int:
        """How often the network looks at each sample."""
        within = self.calls if self.guided_calls is None else self.guided_calls
        further = 0 if self.second is None else self.second.evaluations
        return further + self.calls + within * (self.guided + self.guiding.further)

    @property
    def bucket(self) -> int | None:
        """The rows of each network call; None where they are free."""
        return bucket_rows(self.shape) if self.exact else None

    @property
    def batches(self) -> int:
        """How many batches the samples are drawn in."""
        return math.ceil(self.n / self.batch_size)

    def sentence(self) -> str:
        """Return what will run, in a sentence.

        Example:
            "16 samples of 1x8x8: ddim (eta 0.0), 50 steps on trailing, guidance 2.0: 100 evaluations each"
        """
        options = ", ".join(f"{name} {value}" for name, value in self.options().items())
        words = f"{self.n} sample{'s' * (self.n != 1)} of {'x'.join(map(str, self.shape))}: {self.sampler_name}"
        words += f" ({options})" if options else ""
        words += f", {self.steps} step{'s' * (self.steps != 1)} on {self.grid_name}"
        words += f" from t = {self.strength:g}" if self.strength is not None else ""
        words += f", guidance {self.guidance}" if self.guidance is not None else ""
        words += self.guiding.words()
        words += f", the lower levels at every {self.cache_every}. call" if self.cache_every > 1 else ""
        if self.second is not None:
            height, width = self.second.size
            words += f", and again at {width}x{height} from t = {self.second.strength:g}"
        least = "at least " if self.sampler.adaptive else ""
        return f"{words}: {least}{self.evaluations} evaluation{'s' * (self.evaluations != 1)} each"

    def options(self) -> dict[str, Any]:
        """Return the sampler's options; of a fitted one, none: it is a recipe."""
        return {} if isinstance(self.sampler, Learned) else asdict(self.sampler)

    def recipe(self) -> dict[str, Any] | None:
        """Return a fitted solver's numbers, as JSON holds them; None for any other."""
        if not isinstance(self.sampler, Learned):
            return None
        return {"lam": list(self.sampler.recipe.lam), "weights": [list(row) for row in self.sampler.recipe.weights]}

    def settings(self) -> dict[str, Any]:
        """Return all that decides the samples beside the model, as JSON holds it."""
        return {
            "sampler": self.sampler_name,
            "options": self.options() | self.grid_options,
            "recipe": self.recipe(),
            "grid": self.grid[:-1].tolist() if self.grid_name == "times" else self.grid_name,
            "steps": self.steps,
            "guidance": self.guidance,
            **self.guiding.settings(),
            "clip": self.clip if self.clip is not None else False,
            "threshold": self.threshold,
            "size": list(self.size) if self.size != (0, 0) else None,
            "strength": self.strength,
            "upscale": None if self.second is None else self.second.size[0] // self.size[0],
            "upscale_strength": None if self.second is None else self.second.strength,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype),
            "exact": self.exact,
            "speed": self.speed.name,
            "weights": self.speed.weights,
            "cache_every": self.cache_every if self.cache_every > 1 else None,
            # Free batches have bits of their own; in exact mode a batch's size decides nothing.
            "batch_size": None if self.exact else self.batch_size,
        }


def make_plan(
    denoiser: NetworkDenoiser,
    card: Card,
    n: int,
    *,
    seed: int | Sequence[int] = 0,
    classes: int | str | Sequence[int | str] | None = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    sampler: str | Sampler | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    guidance: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float | None = None,
    perturbed: float | None = None,
    auto_guidance: float | None = None,
    bad: Worse | None = None,
    clip: bool | float | None = None,
    threshold: float | None = None,
    size: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    exact: bool | None = None,
    dtype: str | torch.dtype | None = None,
    cache_every: int | None = None,
    intermediates: int | Sequence[int] = 0,
    strength: float | None = None,
    factor: int = 1,
    speed: Speed = EXACT,
    **options: Any,
) -> SamplingPlan:
    """Settle a request to a model; what is None comes from its card. `Model.sample` says what each means.

    `factor` is how many pixels a side of what is denoised stands for, `speed` how the model computes.

    Raises:
        UsageError: Something is out of range, unknown, or would have no effect.
    """
    defaults = card.sampling
    options = {name: value for name, value in options.items() if value is not None}
    seeds = settle_seeds(n, seed)
    labels = settle_labels(card, len(seeds), classes)
    sampler = defaults.sampler if sampler is None else sampler
    if isinstance(sampler, Learned):
        grid = own_grid(sampler, denoiser.schedule, grid)
    asked = classes is not None or prompt is not None
    w = settle_guidance(card, asked, 1.0 if guidance is None and bad is not None and asked else guidance)
    as_number = "guidance" in card.network.config.get("numbers", ())
    guiding = settle_guiding(
        denoiser, card, w, as_number, guidance_interval=guidance_interval, guidance_rescale=guidance_rescale,
        perturbed=perturbed, auto_guidance=auto_guidance, bad=bad,
    )  # fmt: skip
    prompts, negatives = settle_prompts(card, len(seeds), prompt, negative_prompt, w)
    if sampler == AUTO:
        sampler, grid = settle_automatic(denoiser, card, grid, steps, w)
    grid = defaults.grid if grid is None else grid
    check_options(options, sampler, grid)
    rule = settle_sampler(denoiser, card, sampler, options)
    chosen = settle_grid_options(card, grid, options)
    times = settle_grid(denoiser.schedule, card, grid, steps, chosen)
    if strength is not None:
        strength = settle_strength(strength)
        times = times * strength
    quantile, limit = settle_clipping(card, clip, threshold)
    pixels = settle_size(card, size, factor)
    shape = (card.shape[0], *(side // factor for side in pixels)) if pixels != (0, 0) else card.shape
    return SamplingPlan(
        shape=shape,
        seeds=seeds,
        labels=labels,
        null_label=card.null_label if card.classes and card.unconditional else None,
        sampler_name=sampler_name(rule),
        sampler=rule,
        grid_name=grid if isinstance(grid, str) else "own" if isinstance(rule, Learned) else "times",
        grid_options=chosen,
        grid=times,
        guidance=w,
        clip=limit,
        threshold=quantile,
        dtype=settle_arithmetic(denoiser, dtype, speed),
        exact=settle_exact(exact, speed),
        speed=speed,
        cache_every=settle_reuse(cache_every, denoiser.network, rule, speed, guiding.perturbed is not None),
        batch_size=settle_batch_size(shape, len(seeds), batch_size),
        calls=rule.count(denoiser.schedule, times),
        kept=settle_kept(intermediates, len(times) - 1),
        guidance_told=as_number,
        prompts=prompts,
        negatives=negatives,
        size=pixels,
        strength=strength,
        guiding=guiding,
        guided_calls=None
        if guiding.interval is None
        else count_within(rule, denoiser.schedule, times, guiding.interval),
    )


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number that was asked for, having refused what is none or out of range."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) <= most:
        raise UsageError(f"{name} is {value!r}; it must be a whole number in {least}..{most}")
    return int(value)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


# Samplers and grids, with their options -------------------------------------------------------------


def sampler_options(sampler: type[Sampler] | Sampler) -> dict[str, Any]:
    """Return a sampler's options and their defaults.

    Example:
        >>> sampler_options(samplers["ddim"])
        {'eta': 0.0}
    """
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(sampler)
        if field.init
    }


def grid_options(grid: str | Sequence[float] | Tensor) -> list[str]:
    """Return the names of a grid's options: what its function takes beside the schedule and the steps.

    Example:
        >>> grid_options("karras"), grid_options([1.0, 0.5])
        (['rho'], [])
    """
    return list(inspect.signature(grids[grid]).parameters)[2:] if isinstance(grid, str) else []


def check_options(options: Mapping[str, Any], sampler: str | Sampler, grid: str | Sequence[float] | Tensor) -> None:
    """Refuse an option that neither the sampler nor the grid would look at."""
    named = isinstance(sampler, str)
    own = list(sampler_options(samplers[sampler] if isinstance(sampler, str) else sampler))
    times = grid_options(grid)
    for name in options:
        if name in own and not named:
            raise UsageError(f"{name} is given beside a sampler that has its own; name the sampler, or leave it out")
        if name not in (*own, *times):
            takes = f"sampler {sampler if isinstance(sampler, str) else sampler_name(sampler)} "
            takes += f"takes {', '.join(own) or 'no options'}"
            takes += f", grid {grid} {', '.join(times)}" if times else ""
            others = [other for other in samplers if name in sampler_options(samplers[other])]
            hint = f": it belongs to {', '.join(others)}" if others else nearest(name, [*SETTINGS, *own, *times])
            raise UsageError(f"{name} has no effect here{hint} ({takes})")


def settle_sampler(denoiser: NetworkDenoiser, card: Card, sampler: str | Sampler, asked: Mapping[str, Any]) -> Sampler:
    """Return the sampler, with the options that are asked for and the model's own where none are."""
    rule = sampler if isinstance(sampler, Sampler) else named_sampler(denoiser, card, sampler, asked)
    if isinstance(rule, MeanFlow) and "span" not in card.network.config.get("numbers", ()):
        raise UsageError("sampler mean-flow is for a network that was trained by objective mean-flow; take another")
    if getattr(rule, "variance", None) == "learned" and not denoiser.learned_variance:
        raise UsageError("variance is 'learned', but this model learned none; use small or large")
    return rule


def settle_automatic(
    denoiser: NetworkDenoiser, card: Card, grid: Any, steps: int | None, guidance: float | None
) -> tuple[str | Sampler, str | Tensor]:
    """Return the sampler and the grid that "auto" stands for."""
    if grid is not None:
        raise UsageError("sampler auto brings a grid of its own; leave grid out, or name a sampler")
    most = denoiser.schedule.timesteps if isinstance(denoiser.schedule, Table) else 1_000_000
    count = min(card.sampling.steps, most) if steps is None else whole("steps", steps, 1, most)
    choice = choose(card, denoiser.schedule, count, guidance)
    if isinstance(choice.sampler, Learned):
        return choice.sampler, own_grid(choice.sampler, denoiser.schedule, None)
    return choice.name, str(choice.grid)


def own_grid(sampler: Learned, schedule: Schedule, grid: Any) -> Tensor:
    """Return the times of a fitted solver, which has no others."""
    if grid is not None:
        raise UsageError("a fitted solver has a grid of its own; leave grid out, or name another sampler")
    return sampler.recipe.grid(schedule)


def named_sampler(denoiser: NetworkDenoiser, card: Card, name: str, asked: Mapping[str, Any]) -> Sampler:
    """Return the sampler of that name: what a model has learned is its default, then what its card says."""
    preferred: dict[str, Any] = {"variance": "learned"} if denoiser.learned_variance else {}
    preferred |= card.sampling.options if name == card.sampling.sampler else {}
    known = sampler_options(samplers[name])
    chosen = {option: value for option, value in {**preferred, **asked}.items() if option in known}
    try:
        rule: Sampler = samplers[name](**chosen)
    except TypeError as error:
        raise UsageError(f"sampler {name} does not take {chosen}: {first_line(error)}") from None
    return rule


def settle_grid_options(card: Card, grid: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grid's options that are asked for, and the model's own where none are."""
    known = grid_options(grid)
    preferred = card.sampling.options if grid == card.sampling.grid else {}
    return {name: value for name, value in {**preferred, **asked}.items() if name in known}


def sampler_name(sampler: Sampler) -> str:
    """Return a sampler's name in the registry; that of its class where it has none there."""
    if isinstance(sampler, Learned):
        return "fitted"
    return next((name for name in samplers if samplers[name] is type(sampler)), type(sampler).__name__)


def settle_grid(
    schedule: Schedule,
    card: Card,
    grid: str | Sequence[float] | Tensor,
    steps: int | None,
    options: Mapping[str, Any],
) -> Float[Tensor, " n"]:
    """Return the times (N + 1,): of a grid by name, or the times or timesteps given."""
    if isinstance(grid, str):
        most = schedule.timesteps if isinstance(schedule, Table) else 1_000_000
        count = min(card.sampling.steps, most) if steps is None else whole("steps", steps, 1, most)
        try:
            return grids[grid](schedule, count, **options)
        except TypeError as error:
            raise UsageError(f"grid {grid} does not take {dict(options)}: {first_line(error)}") from None
    values: list[Any] = grid.tolist() if isinstance(grid, Tensor) else list(grid)
    if not values:
        raise UsageError("grid holds no times; give a name, or times in (0, 1], or a table's timesteps, decreasing")
    integers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    times = from_timesteps(schedule, values) if integers else from_times([finite("a time", t) for t in values])
    if steps is not None and steps != len(times) - 1:
        raise UsageError(f"steps is {steps}, but the grid has {len(times) - 1}; leave steps out")
    return times
