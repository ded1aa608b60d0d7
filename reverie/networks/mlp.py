r"""A residual network for points: the smallest thing that can learn to denoise.

h_0 = W_in x,    emb = act(W_2 silu(W_1 features(time)) + embedding(label))
h_{i+1} = h_i + V_i drop(act(U_i act(norm(h_i)) + T_i emb)),    out = W_out act(norm(h_n))               (1)
"""

from typing import Annotated, Literal

from jaxtyping import Float, Int, Real
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.networks.layers import ACTIVATIONS, Fourier, Linear, Sinusoids, TimeEmbedding, checked, zeroed

Width = Annotated[int, Field(ge=1, le=65536)]


class MLPConfig(BaseModel):
    """The settings of an MLP.

    Example:
        >>> MLPConfig(in_channels=2, num_class_embeds=3).out_channels
        2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    in_channels: Width = 2
    """Numbers in a point that is given."""
    out_channels: Width = 2
    """Numbers in a point that is returned: as many as given, unless said otherwise."""
    width: Annotated[int, Field(ge=4, le=16384)] = 128
    """Channels inside."""
    layers: Annotated[int, Field(ge=1, le=256)] = 3
    """Residual blocks."""
    time_features: Literal["sinusoids", "fourier"] = "sinusoids"
    """Sinusoids with periods from 2 pi to 20000 pi, for timesteps; or 64 random frequencies of about 1, for
    times of about 1."""
    num_class_embeds: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rows of the class embedding; a label is one of 0 .. num_class_embeds - 1."""
    time_cond_proj_dim: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Channels of a vector that is projected and added to the features of the time."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout within the residual blocks."""
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    """The activation."""

    @model_validator(mode="after")
    def _settle(self) -> "MLPConfig":
        if "out_channels" not in self.model_fields_set:
            self.__dict__["out_channels"] = self.in_channels
        return self


class ResidualLayer(nn.Module):
    """One residual block of equation (1)."""

    def __init__(self, width: int, act: str, dropout: float) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.norm = nn.LayerNorm(width)
        self.linear_1 = Linear(width, width)
        self.time = Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = zeroed(Linear(width, width))

    def forward(self, h: Float[Tensor, "b w"], emb: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        inner = self.linear_1(self.act(self.norm(h))) + self.time(emb)
        return h + self.linear_2(self.dropout(self.act(inner)))


class MLP(nn.Module):
    """A residual network for points, with one time for each.

    Arguments:
        config: What it is made of.

    Example:
        >>> import torch
        >>> MLP(MLPConfig(in_channels=3))(torch.zeros(5, 3), time=torch.rand(5)).shape
        torch.Size([5, 3])
    """

    Config = MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.act = ACTIVATIONS[config.act_fn]
        fourier = config.time_features == "fourier"
        self.time_proj = Fourier(64, scale=1.0, log=False) if fourier else Sinusoids(width)
        self.time_embedding = TimeEmbedding(128 if fourier else width, width, cond_dim=config.time_cond_proj_dim)
        self.class_embedding = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, width)
        self.linear_in = Linear(config.in_channels, width)
        self.layers = nn.ModuleList([ResidualLayer(width, config.act_fn, config.dropout) for _ in range(config.layers)])
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = zeroed(Linear(width, config.out_channels))

    def forward(
        self,
        x: Float[Tensor, "b d"],
        time: Real[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        time_cond: Float[Tensor, "b e"] | None = None,
    ) -> Float[Tensor, "b out"]:
        """Return one point for each of the points x (B, D), at their times (B,), of their classes (B,).

        Arguments:
            x: The points (B, D).
            time: One time for each (B,).
            label: One class for each (B,), where the config has classes.
            time_cond: A vector that joins the time (B, E), where the config has time_cond_proj_dim.

        Raises:
            UsageError: Something is missing, is not wanted, or has the wrong shape.
        """
        self._check(x, time, label)
        due = self.config.time_cond_proj_dim
        if (None if time_cond is None else tuple(time_cond.shape)) != (None if due is None else (len(x), due)):
            raise UsageError(f"time_cond must be {'left out' if due is None else (len(x), due)} for this network")
        emb = self.time_embedding(self.time_proj(time), time_cond)
        if label is not None and self.class_embedding is not None:
            emb = emb + self.class_embedding(checked(label, self.class_embedding, "label"))
        emb = self.act(emb)
        h = self.linear_in(x)
        for layer in self.layers:
            h = layer(h, emb)
        return self.linear_out(self.act(self.norm_out(h)))

    def _check(self, x: Tensor, time: Tensor, label: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.config.in_channels:
            raise UsageError(f"the points are {tuple(x.shape)}; this network takes (B, {self.config.in_channels})")
        if time.shape != (len(x),):
            raise UsageError(f"time is {tuple(time.shape)}; it must hold one number for each point, ({len(x)},)")
        if (label is None) != (self.class_embedding is None):
            wanted = "needs a label for each point" if label is None else "was built without classes; give no label"
            raise UsageError(f"this network {wanted}")
        if label is not None and label.shape != (len(x),):
            raise UsageError(f"label is {tuple(label.shape)}; it must hold one class for each point, ({len(x)},)")
