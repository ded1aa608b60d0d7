r"""One optimiser step: loss, gradient, and whether to believe them.

A step whose loss or gradient is not finite, or whose gradient is many times its running mean, changes
nothing: not the weights, not Adam's moments, not the averages.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from reverie.base.randomness import normals, torch_seed, uniform
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.objectives import Objective
from reverie.diffusion.times import TimeSampler
from reverie.diffusion.uncertainty import Weighed
from reverie.models.conditioning import Told
from reverie.training.config import TrainConfig
from reverie.training.masks import beside

MEMORY = 0.98  # of the running mean of the gradient's norm
SETTLED = 50  # steps before that mean is believed


@contextmanager
def seeded(enabled: bool, *key: int | str) -> Iterator[None]:
    """A block in which torch's own generators are a function of a key; the caller's state comes back after it."""
    with torch.random.fork_rng(enabled=enabled):
        if enabled:
            torch.manual_seed(torch_seed(*key))
        yield


@dataclass
class Examples:
    """A step's training data, on the device.

    Arguments:
        x0: Clean images (B, C, H, W) in [-1, 1].
        t: Times (B,).
        factor: What makes the times' losses unbiased (B,).
        eps: Noise (B, C, H, W).
        condition: What the network is told, tensors of B rows by its keyword: nothing, where that is hidden.
    """

    x0: Tensor
    t: Tensor
    factor: Tensor
    eps: Tensor
    condition: dict[str, Tensor]

    def part(self, index: slice) -> "Examples":
        """Return some of them."""
        condition = {name: value[index] for name, value in self.condition.items()}
        return Examples(self.x0[index], self.t[index], self.factor[index], self.eps[index], condition)


def to_unit(images: Tensor) -> Tensor:
    """Return 8-bit images as floats in [-1, 1], and latents, which are floats, as they are."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def draw_examples(
    images: Tensor,
    told: Told | None,
    positions: Sequence[int],
    times: TimeSampler,
    step: int,
    config: TrainConfig,
) -> Examples:
    """Return what a step trains on; everything random in it is a function of the seed and of (step, position)."""
    drawn = times(len(images), config.seed, "time", step)
    eps = normals(images.shape[1:], [(config.seed, "train", int(p)) for p in positions])
    hidden = uniform((len(images),), config.seed, "hide", step) < config.label_dropout
    x0, condition = to_unit(images), hide(told, hidden)
    if config.fill:
        condition["beside"] = beside(x0, positions, config.seed, "mask")
    return Examples(x0, drawn.t, drawn.factor, eps, condition)


def hide(told: Told | None, hidden: Tensor) -> dict[str, Tensor]:
    """Return what the network is told, and nothing where it is hidden (B,)."""
    if told is None:
        return {}
    assert told.nothing is not None
    rows = {name: hidden.reshape(-1, *[1] * (value.ndim - 1)) for name, value in told.condition.items()}
    return {name: torch.where(rows[name], told.nothing[name], value) for name, value in told.condition.items()}


def on_device(examples: Examples, device: torch.device, layout: torch.memory_format) -> Examples:
    """Return the examples on a device, images in a memory layout."""
    condition = {name: value.to(device) for name, value in examples.condition.items()}
    x0 = examples.x0.to(device, memory_format=layout)
    eps = examples.eps.to(device, memory_format=layout)
    return Examples(x0, examples.t.to(device), examples.factor.to(device), eps, condition)


@dataclass(frozen=True)
class StepReport:
    """What a step did: its loss, its gradient's norm, why it was skipped, if it was; and what the loss is made of."""

    loss: float
    norm: float
    skipped: str = ""
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Update:
    """The optimiser step, with its memory of gradients.

    Arguments:
        denoiser: What is trained.
        objective: Its loss.
        times: Where the times came from; it learns from the losses.
        optimizer: AdamW over the denoiser's parameters, and over those that the objective learns.
        config: The run's configuration.
        rate: The learning rate after warm-up.
        mean_norm: The running mean of the gradient's norm.
        counted: Steps that went into it.
    """

    denoiser: Denoiser
    objective: Objective
    times: TimeSampler
    optimizer: AdamW
    config: TrainConfig
    rate: float
    mean_norm: float = 0.0
    counted: int = 0
    parameters: list[nn.Parameter] = field(init=False)
    kept: list[nn.Module] = field(init=False)  # those that put their weights right after each update

    def __post_init__(self) -> None:
        trained = [self.denoiser, *([self.objective.learned] if self.objective.learned else [])]
        self.parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
        modules = [module for part in trained for module in part.modules()]
        self.kept = [module for module in modules if hasattr(module, "after_update")]

    def __call__(self, examples: Examples, step: int) -> StepReport:
        """Make step number `step` (from 0) on these examples, or skip it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step, self.rate)
        self.objective.begin(step)
        losses = self.backward(examples, step)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        loss = float((losses * examples.factor).mean())
        skipped = doubt(loss, norm, self.config.spike * self.mean_norm if self.counted >= SETTLED else math.inf)
        if not skipped:
            self.optimizer.step()
            for module in self.kept:
                module.after_update()  # type: ignore[operator]
            self.times.learn(examples.t, losses)
            self.mean_norm = norm if self.counted == 0 else MEMORY * self.mean_norm + (1 - MEMORY) * norm
            self.counted += 1
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(loss, norm, skipped)

    def learn_levels(self, uncertainty: nn.Module) -> None:
        """Learn from now on how much each noise level counts, too."""
        self.objective = Weighed(self.objective, uncertainty)
        self.optimizer.add_param_group({"params": list(uncertainty.parameters())})
        self.__post_init__()

    def named_weights(self, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return what is trained, by name: a network's weights, and those of the objective's own."""
        own = self.objective.learned.named_parameters() if self.objective.learned else ()
        return [*network.named_parameters(), *((f"objective/{name}", weight) for name, weight in own)]

    def backward(self, examples: Examples, step: int) -> Tensor:
        """Accumulate the gradient part by part; return the losses (B,)."""
        size = len(examples.x0) // self.config.accumulate
        losses = []
        for i in range(self.config.accumulate):
            part = examples.part(slice(i * size, (i + 1) * size))
            with seeded(self.config.dropout > 0 or self.objective.draws, self.config.seed, "dropout", step, i):
                loss = self.objective(self.denoiser, part.x0, part.t, part.eps, part.condition)
            ((loss * part.factor).sum() / len(examples.x0)).backward()
            losses.append(loss.detach())
        return torch.cat(losses)


def doubt(loss: float, norm: float, most: float) -> str:
    """Return why a step is not to be believed, or nothing.

    Arguments:
        loss: Its loss.
        norm: The gradient's norm.
        most: The largest norm that is believed: many times the running mean, infinite before that is settled.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    return f"the gradient's norm is {norm:.3g}, beyond {most:.3g}, many times its running mean" if norm > most else ""
