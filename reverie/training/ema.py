r"""Averages of the weights along training, which sample better than the weights themselves.

    ema <- d_t ema + (1 - d_t) w_t,    d_t = min(decay, (1 + t) / (10 + t)),                          (1)

where t counts the steps before this one: d_t starts at 0.1 and lets go of the random start within a few steps,
and equals `decay` from t = (10 decay - 1) / (1 - decay) on. As d_t is a function of the step, an average carries
no counter that a resume could lose. Steps that training skipped must be skipped here too, by the caller.

References:
    tf.train.ExponentialMovingAverage, num_updates: the warm-up of (1)
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    Acceleration of stochastic approximation by averaging (Polyak & Juditsky, 1992)
    https://doi.org/10.1137/0330046
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from weakref import WeakSet

import torch
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.models.checkpoints import check_tensors
from reverie.training.config import TrainConfig
from reverie.training.power import exponent_of

# Models that hold an average at the moment: what is taken from them now is not their own weights.
swapped: WeakSet[nn.Module] = WeakSet()


def distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a model's state, each once, and for every name of the state the name of its tensor.

    Example:
        >>> tied = nn.ModuleList([nn.Linear(2, 2, bias=False)] * 2)
        >>> tensors, names = distinct(tied)
        >>> list(tensors), names
        (['0.weight'], {'0.weight': '0.weight', '1.weight': '0.weight'})
    """
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names[name] = first.setdefault(id(tensor), name)
            tensors[names[name]] = tensor
    return tensors, names


def averageable(tensor: Tensor) -> bool:
    """Return whether a tensor is averaged (a weight) or copied (a buffer, anything that counts)."""
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


class EMA:
    """An exponential moving average of a model's weights, in float32 at least; its buffers are copied.

    Another profile is a subclass with its own `decay_at` and `name`.

    Arguments:
        model: The model to follow, where it will stay, as for an optimizer: on its device, in its dtype, and the
            bare one, as the names of a compiled or distributed wrapper differ.
        decay: The decay after warm-up, in [0, 1).
        warmup: Whether the decay grows as in (1), or is constant.

    Raises:
        UsageError: decay lies outside [0, 1).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = EMA(model, decay=0.9, warmup=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema.update(step=0)
        >>> ema.state()["weight"]
        tensor([[0.1000, 0.1000]])
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay of an average is {decay}; it must lie in [0, 1), such as 0.9999")
        self.model = model
        self.decay = decay
        self.warmup = warmup

        tensors, self._names = distinct(model)
        self._live: list[Tensor] = []
        self._weights: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if averageable(tensor):
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                self._weights[name] = tensor.detach().to(dtype, copy=True)
                self._live.append(tensor)
            else:
                self._buffers[name] = tensor.detach().clone()

    @property
    def name(self) -> str:
        """What to call it in a checkpoint: "ema-0.9999"."""
        return f"ema-{self.decay:.12g}"

    def decay_at(self, step: int) -> float:
        """Return d_t of (1) for the step that t others came before."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after a step.

        Arguments:
            step: How many steps came before this one: 0 for the first.

        Raises:
            RuntimeError: The model holds an average at the moment.
        """
        if self.model in swapped:
            raise RuntimeError("update within applied(): the model holds an average, not its own weights")
        if averages := list(self._weights.values()):
            live = [weight.detach().to(average.dtype) for weight, average in zip(self._live, averages, strict=True)]
            torch._foreach_lerp_(averages, live, 1 - self.decay_at(step))
        for name, buffer in self._buffers.items():
            buffer.copy_(attrgetter(name)(self.model))  # looked up each time: modules replace buffers

    def weights(self) -> dict[str, Tensor]:
        """Return what is averaged: each weight once, without what is copied."""
        return dict(self._weights)

    def state(self) -> dict[str, Tensor]:
        """Return the average under the names of the model's own state: weights that a model can load."""
        tensors = self._weights | self._buffers
        return {name: tensors[first] for name, first in self._names.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], source: str = "the saved average") -> None:
        """Go on from a saved average.

        Arguments:
            state: What `state` returned, then.
            source: Where it comes from, for the error message.

        Raises:
            ModelFileError: Names, shapes or dtypes differ; nothing was taken.
        """
        own = self.state()
        check_tensors(own, state, source)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give a model the averaged weights inside the block; its own come back, bit for bit, however it ends.

        Arguments:
            model: The model followed, or another of its shape.

        Raises:
            UsageError: The model is of another shape.
        """
        live, _ = distinct(model)
        average = self._weights | self._buffers
        if {name: tensor.shape for name, tensor in live.items()} != {n: tensor.shape for n, tensor in average.items()}:
            raise UsageError(f"{self.name} follows a model of other tensors; apply it to a model built as that one")
        own = {name: tensor.detach().clone() for name, tensor in live.items()}
        nested = model in swapped
        swapped.add(model)
        try:
            overwrite(live, average)
            yield model
        finally:
            overwrite(live, own)
            if not nested:
                swapped.discard(model)


class PowerEMA(EMA):
    """An average whose length stays a share of the run so far, from which other lengths can be built (power.py).

    Arguments:
        model: The model to follow.
        sigma_rel: The relative length, above 0 and at most 0.2887.

    Raises:
        UsageError: There is no such length.

    Example:
        >>> PowerEMA(nn.Linear(2, 1), 0.1).decay_at(step=99)
        0.923...
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel, self.exponent = sigma_rel, exponent_of(sigma_rel)
        super().__init__(model, warmup=False)

    @property
    def name(self) -> str:
        """What to call it in a checkpoint: "ema-power-0.1"."""
        return f"ema-power-{self.sigma_rel:.12g}"

    def decay_at(self, step: int) -> float:
        """Return beta of power.py's (1) for the step that t others came before: 0 for the first."""
        return (1 - 1 / (step + 1)) ** (self.exponent + 1)


def make_averages(config: TrainConfig, model: nn.Module) -> list[EMA]:
    """Return the averages that a run keeps of its network, the one that is sampled first."""
    lengths: list[EMA] = [PowerEMA(model, length) for length in config.ema_lengths]
    return [*lengths, *(EMA(model, decay) for decay in config.decays)]


@torch.no_grad()
def overwrite(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names, in place."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
