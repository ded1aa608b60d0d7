"""What is asked of a model, settled in every detail and checked, before anything is computed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.learned import Learned
from reverie.models.automatic import AUTO
from reverie.models.card import Card
from reverie.models.guiding import UNGUIDED, Guiding, Worse, count_within, settle_guiding
from reverie.models.reuse import settle_reuse
from reverie.models.settling import (
    DTYPES,
    bucket_rows,
    settle_arithmetic,
    settle_batch_size,
    settle_clipping,
    settle_exact,
    settle_guidance,
    settle_kept,
    settle_labels,
    settle_prompts,
    settle_seeds,
    settle_size,
    settle_strength,
)
from reverie.models.solving import (
    check_options,
    own_grid,
    sampler_name,
    settle_automatic,
    settle_grid,
    settle_grid_options,
    settle_sampler,
)
from reverie.models.speed import EXACT, Speed


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
        known = self.sampler.recipe
        return {"lam": list(known.lam), "weights": [list(row) for row in known.weights], "kept": list(known.kept)}

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
