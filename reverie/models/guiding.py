"""What a request says of guidance beside its weight w: by a worse model, by broken attention, rescaled, for a time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, NetworkDenoiser, Times
from reverie.diffusion.guidance.auto import check_same_noise
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.samplers.base import Sampler, run, start
from reverie.diffusion.schedules import Schedule
from reverie.models.card import Card
from reverie.networks.attention import pixel_attentions

KINDS = ("guidance_interval", "guidance_rescale", "perturbed", "auto_guidance", "bad")


@dataclass(frozen=True)
class Worse:
    """A worse model, which guides a better one.

    Arguments:
        denoiser: Its network as a denoiser.
        card: Its card.
        conditioner: What reads prompts for it; None where it takes none.
        record: Which model it is, as JSON holds it: its path as it was given, its sha256.
    """

    denoiser: NetworkDenoiser
    card: Card
    conditioner: Any
    record: dict[str, str | None] = field(compare=False)


@dataclass(frozen=True)
class Guiding:
    """Guidance beside w, settled; all None for none.

    Arguments:
        interval: The times during which there is guidance, of any kind: low < t <= high.
        rescale: phi of guidance rescale.
        perturbed: s of perturbed-attention guidance.
        auto: w of autoguidance.
        bad: The model that autoguidance leads away from.
    """

    interval: tuple[float, float] | None = None
    rescale: float | None = None
    perturbed: float | None = None
    auto: float | None = None
    bad: Worse | None = None

    @property
    def further(self) -> int:
        """How many more networks are asked where there is guidance, beside those that w calls for."""
        return (self.bad is not None) + (self.perturbed is not None)

    def settings(self) -> dict[str, Any]:
        """Return it by the names of the request, as JSON holds it."""
        return {
            "guidance_interval": None if self.interval is None else list(self.interval),
            "guidance_rescale": self.rescale,
            "perturbed": self.perturbed,
            "auto_guidance": self.auto,
            "bad": None if self.bad is None else dict(self.bad.record),
        }

    def words(self) -> str:
        """Return it in words, as they follow on the guidance."""
        words = f", autoguidance {self.auto:g}" if self.auto is not None else ""
        words += f", perturbed {self.perturbed:g}" if self.perturbed is not None else ""
        words += f", rescaled {self.rescale:g}" if self.rescale is not None else ""
        return words + ("" if self.interval is None else " for t in ({:g}, {:g}]".format(*self.interval))


UNGUIDED = Guiding()


def settle_guiding(
    denoiser: NetworkDenoiser,
    card: Card,
    w: float | None,
    told: bool,
    *,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float | None = None,
    perturbed: float | None = None,
    auto_guidance: float | None = None,
    bad: Worse | None = None,
) -> Guiding:
    """Return the guidance beside w, having refused what is out of range or would have no effect.

    Arguments:
        denoiser: The model's.
        card: Its card.
        w: The weight of classifier-free guidance; None where nothing is asked for.
        told: Whether the network is told w as a number, and does by itself what guidance does.
        guidance_interval: Two times.
        guidance_rescale: phi; 0 is none.
        perturbed: s; 0 is none.
        auto_guidance: The weight of autoguidance.
        bad: The model that it leads away from.
    """
    values = (guidance_interval, guidance_rescale, perturbed, auto_guidance, bad)
    if told and (given := [name for name, value in zip(KINDS, values, strict=True) if value is not None]):
        raise UsageError(
            f"{given[0]} is given, but this model was taught its guidance and is told it as a number; leave it out"
        )
    guiding = Guiding(
        settle_interval(guidance_interval),
        settle_rescale(guidance_rescale),
        settle_perturbed(denoiser.network, perturbed),
        settle_auto(denoiser, card, w, auto_guidance, bad),
        bad,
    )
    if not guiding.further and w in (None, 0.0, 1.0):
        for name, value in (("guidance_interval", guiding.interval), ("guidance_rescale", guiding.rescale)):
            if value is not None:
                raise UsageError(
                    f"{name} has no effect at guidance {w}; ask for a class or a prompt and another guidance, "
                    "or for perturbed or auto_guidance"
                )
    return guiding


def settle_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """Return two times; None for all of time."""
    if interval is None:
        return None
    bounds = tuple(interval)
    fine = len(bounds) == 2 and all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds)
    if not fine or not 0 <= bounds[0] < bounds[1] <= 1:
        raise UsageError(
            f"guidance_interval is {','.join(map(str, bounds))}; it must be two times, 0 <= low < high <= 1, as 0.2,0.8"
        )
    return None if bounds == (0, 1) else (float(bounds[0]), float(bounds[1]))


def settle_rescale(rescale: float | None) -> float | None:
    """Return phi; None for none."""
    if rescale is not None and not 0 <= finite("guidance_rescale", rescale) <= 1:
        raise UsageError(f"guidance_rescale is {rescale}; it must lie in [0, 1] (0 means none)")
    return float(rescale) if rescale else None


def settle_perturbed(network: nn.Module, scale: float | None) -> float | None:
    """Return s; None for none."""
    if not scale:
        return None
    if not pixel_attentions(network):
        raise UsageError(
            f"perturbed is {scale}, but this model's network has no self-attention to perturb; leave it out"
        )
    return finite("perturbed", scale)


def settle_auto(
    denoiser: NetworkDenoiser, card: Card, w: float | None, weight: float | None, bad: Worse | None
) -> float | None:
    """Return the weight of autoguidance, having refused a model that can't be the worse one."""
    if bad is None and weight is None:
        return None
    if bad is None or weight is None:
        missing, given = ("bad, the worse model", "auto_guidance") if bad is None else ("auto_guidance", "bad")
        raise UsageError(f"{given} is given without {missing}; autoguidance needs both")
    if finite("auto_guidance", weight) == 1:
        raise UsageError("auto_guidance is 1, which is none; give more than 1, or leave it and bad out")
    if w not in (None, 1.0):
        raise UsageError(f"guidance is {w} beside auto_guidance {weight}; guide by one of them, the other at 1")
    if bad.card.shape != card.shape or channels(bad.denoiser) != channels(denoiser):
        raise UsageError(f"bad is a model of {words(bad.card.shape)}, this one of {words(card.shape)}; give one alike")
    same = bad.card.classes == card.classes and bad.card.unconditional == card.unconditional
    if not same or (bad.card.text is None) != (card.text is None):
        raise UsageError("bad was trained with other classes, or other words, than this model; give one alike")
    check_same_noise(denoiser, bad.denoiser)
    return float(weight)


def channels(denoiser: NetworkDenoiser) -> int | None:
    """Return how many channels a network sees, where it says so."""
    return getattr(getattr(denoiser.network, "config", None), "in_channels", None)


def words(shape: Iterable[int]) -> str:
    """Return a shape in words: 1x8x8."""
    return "x".join(map(str, shape))


def finite(name: str, value: Any) -> float:
    """Return a number that was asked for, having refused what is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def broken(network: nn.Module) -> list[nn.Module]:
    """Return the self-attentions that perturbed guidance breaks: those of the middle block; all, where it has none.

    Example:
        >>> from reverie.networks.unet import UNet, UNetConfig
        >>> network = UNet(UNetConfig(in_channels=1, channels=(8, 16), attention=(False, True)))
        >>> len(broken(network)), len(pixel_attentions(network))
        (1, 6)
    """
    found = pixel_attentions(network)
    middle = [part for place, part in found.items() if "mid_block" in place.split(".")]
    return middle or list(found.values())


# How often --------------------------------------------------------------------------------------


class Clock(Denoiser):
    """Writes down the times that a sampler asks for, and answers zero.

    Arguments:
        schedule: The schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.times: list[float] = []

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        self.times += t.tolist()
        return Estimate(torch.zeros_like(x), x / per_sample(self.schedule.sigma(t), x), torch.zeros_like(x))


def count_within(sampler: Sampler, schedule: Schedule, grid: Float[Tensor, " n"], interval: tuple[float, float]) -> int:
    """Return how often a sampler asks the denoiser at times within an interval, by letting it walk the grid once.

    An adaptive sampler's way depends on the answers: it is taken to ask nothing there, so that the count is the least.

    Raises:
        UsageError: It never does: guidance within the interval would have no effect.

    Example:
        >>> from reverie.diffusion.registry import grids, samplers, schedules
        >>> schedule = schedules["flow"]()
        >>> count_within(samplers["ddim"](), schedule, grids["trailing"](schedule, 10), (0.2, 0.8))
        6
    """
    if sampler.adaptive:
        return 0
    clock, noise = Clock(schedule), Noise([0])
    state = start(sampler, schedule, (1,), grid[0], noise)
    for _ in run(sampler, clock, state, grid, noise):
        pass
    count = sum(interval[0] < t <= interval[1] for t in clock.times)
    if count == 0:
        raise UsageError(
            "no step asks the model at a time in guidance_interval ({:g}, {:g}]; widen it".format(*interval)
        )
    return count
