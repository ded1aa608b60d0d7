r"""A network that is told further numbers beside its time: how far a step goes, how strongly it is guided.

    c = [sinusoids(1000 k a), sinusoids(1000 k b), ...],    out = N(x, k time, time_cond = c),       (1)

where N adds a projection of c to its features of the time, as latent consistency models have it. The projection
begins at zero: put around a network that was trained without the numbers, it is that network at first. k is 1, or
`clock`: a network whose slope in time is taken must not change with the quickest of its sinusoids, whose argument
goes through 1000 radians between t = 0 and 1. With k = 1/100 they are those of n / 2 .. n - 1 of before, and n / 2
slower ones, so that `slowed` weights are the network that they were but for its quick features.

References:
    Latent Consistency Models (Luo et al., 2023), section 4.2
    https://arxiv.org/abs/2310.04378
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Real
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.networks.layers import Sinusoids, zeroed
from reverie.networks.mlp import MLP, MLPConfig
from reverie.networks.unet import UNet
from reverie.networks.unet_config import UNetConfig

ABSENT = {"span": 0.0, "guidance": 1.0}  # what a number is where none is given: no way to go, no guidance


class NumberedConfig(BaseModel):
    """A network with numbers beside its time.

    Example:
        >>> NumberedConfig(numbers=("span",), unet={"channels": (8, 16)}).inner.time_cond_proj_dim
        64
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    numbers: Annotated[tuple[Literal["span", "guidance"], ...], Field(min_length=1, max_length=2)]
    """What they are called."""
    features: Annotated[int, Field(ge=4, le=4096)] = 64
    """Sinusoids of each."""
    clock: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What times and numbers are multiplied by before their sinusoids are taken."""
    unet: UNetConfig | None = None
    """A U-Net inside,"""
    mlp: MLPConfig | None = None
    """or a network for points."""

    @property
    def inner(self) -> UNetConfig | MLPConfig:
        """The network inside, with what the numbers bring to it.

        Raises:
            UsageError: There is none, or two.
        """
        given = [config for config in (self.unet, self.mlp) if config is not None]
        if len(given) != 1:
            raise UsageError("a network with numbers beside its time has one network inside: unet or mlp")
        told = {"time_cond_proj_dim": self.features * len(self.numbers)}
        return type(given[0])(**(given[0].model_dump(exclude_unset=True) | told))

    @property
    def in_channels(self) -> int:
        """Channels that are given."""
        return self.inner.in_channels

    @property
    def out_channels(self) -> int:
        """Channels that are returned."""
        return self.inner.out_channels

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the class embedding."""
        return self.inner.num_class_embeds


class Numbered(nn.Module):
    """A network that is told further numbers beside its time: equation (1).

    Arguments:
        config: What it is made of.

    Example:
        >>> net = Numbered(NumberedConfig(numbers=("span",), mlp={"in_channels": 3}))
        >>> net(torch.zeros(5, 3), time=torch.rand(5), span=torch.rand(5)).shape
        torch.Size([5, 3])
    """

    Config = NumberedConfig

    def __init__(self, config: NumberedConfig) -> None:
        super().__init__()
        self.config, inner = config, config.inner
        self.features = Sinusoids(config.features)
        self.inner: nn.Module = MLP(inner) if isinstance(inner, MLPConfig) else UNet(inner)
        projection = self.inner.time_embedding.cond_proj
        assert isinstance(projection, nn.Module)
        zeroed(projection)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the inside of the layers is computed again for the gradients."""
        return bool(getattr(self.inner, "gradient_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.inner.gradient_checkpointing = on  # type: ignore[assignment]

    def forward(
        self,
        x: Float[Tensor, "b ..."],
        time: Real[Tensor, " b"],
        span: Real[Tensor, " b"] | None = None,
        guidance: Real[Tensor, " b"] | None = None,
        **told: Any,
    ) -> Float[Tensor, "b ..."]:
        """Return what the network inside makes of x.

        Arguments:
            x: Points or images (B, ...).
            time: One time for each (B,).
            span: How far the step goes, in t (B,); 0 where none is given.
            guidance: How strongly it is guided (B,); 1 where none is given.
            told: What else the network inside takes.

        Raises:
            UsageError: A number that this network does not take.
        """
        given = {"span": span, "guidance": guidance}
        if extra := [name for name, value in given.items() if value is not None and name not in self.config.numbers]:
            raise UsageError(f"this network takes {', '.join(self.config.numbers)} beside its time, and no {extra[0]}")
        values = [given[name] for name in self.config.numbers]
        filled = [
            torch.full_like(time, ABSENT[name], dtype=torch.float32) if value is None else value
            for name, value in zip(self.config.numbers, values, strict=True)
        ]
        clock = self.config.clock
        cond = torch.cat([self.features(1000 * clock * value) for value in filled], 1)
        return self.inner(x, clock * time if clock != 1 else time, time_cond=cond, **told)


SLOW = 0.01  # the clock that moves sinusoids by half of their number


def slowed(weight: Float[Tensor, "e n"]) -> Float[Tensor, "e n"]:
    """Return the weights on sines and cosines (E, N) of a time for those of its hundredth: slow features stay.

    Raises:
        UsageError: N is not a multiple of 4.

    Example:
        >>> slowed(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2., 0., 4., 0.]])
    """
    if weight.shape[1] % 4:
        raise UsageError(f"the network has {weight.shape[1]} features of the time; it takes a multiple of 4 of them")
    first, second = weight.chunk(2, 1)
    half = first.shape[1] // 2
    return torch.cat([part for one in (first, second) for part in (one[:, half:], torch.zeros_like(one[:, half:]))], 1)
