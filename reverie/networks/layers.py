r"""The layers that networks are made of, on the operators of `reverie.kernels`, each in one place.

    group_norm:  y = act((x - mean_g) / sqrt(var_g + eps) * weight + bias),    or, with a scale and a shift,
                 y = act(((x - mean_g) / ... + bias) * (1 + scale) + shift)                                 (1)
    linear:      y = x W^T + b                                                                              (2)
    attention:   y = softmax(q k^T / sqrt(D)) v, for each head of width D                                   (3)

They keep the layout of what they are given: images in channels-last stay so, without a copy.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B
    https://arxiv.org/abs/2006.11239
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 3
    https://arxiv.org/abs/2105.05233
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.kernels import ACTIVATIONS, attention, convolution, group_norm, layer_norm, linear, self_attention

__all__ = ["ACTIVATIONS", "attention", "group_norm", "linear", "self_attention"]

Image = Float[Tensor, "b c h w"]
Resized = Float[Tensor, "b c h2 w2"]
SizeOf = Float[Tensor, "_ _ h2 w2"]  # an image of which only the size is looked at
AnyImage = Float[Tensor, "b _ _ _"]
Resample = Callable[[Tensor], Tensor]

# The operators as modules, with PyTorch's parameter names ------------------------------------------


class GroupNorm(nn.GroupNorm):
    """Group norm followed by an activation, with what is added before it, a scale and a shift where they are given."""

    def forward(
        self,
        input: Tensor,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, act, scale, shift, add)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of the last dimension on the operator of `reverie.kernels`."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)


class Conv2d(nn.Conv2d):
    """nn.Conv2d on the operator of `reverie.kernels`, for convolutions that are neither dilated nor in groups."""

    def forward(self, input: Tensor) -> Tensor:
        return convolution(input, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class Linear(nn.Linear):
    """nn.Linear on the operator of this file."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def zeroed(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero: a branch that ends so starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def added(x: Tensor, layer: nn.Module, h: Tensor) -> Tensor:
    """Return x + layer(h): in one walk where the layer can, and x has the dtype that it computes in."""
    return layer(h, x) if getattr(layer, "adds_to", None) == x.dtype else x + layer(h)


def repeated(x: Float[Tensor, "b *d"], count: int) -> Float[Tensor, "_ *d"]:
    """Return a batch, again and again until it has so many rows."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


# Time -----------------------------------------------------------------------------------------


class Sinusoids(nn.Module):
    r"""Sines and cosines of the time at frequencies from 1 down to 1 / 10000.

    f_k = 10000^(-k / (n - shift)), k = 0 .. n - 1, n = width // 2;    [sin(t f), cos(t f)]              (4)

    They are computed in float32 whatever the network's type: a time of 999 has no place in bfloat16.

    Arguments:
        width: Number of features; an odd one ends with a zero.
        cos_first: Cosines before sines.
        shift: Zero, or one, which makes the last frequency 1 / 10000 exactly.

    Example:
        >>> Sinusoids(6)(torch.zeros(1)).tolist()
        [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, width: int, cos_first: bool = False, shift: float = 0.0) -> None:
        super().__init__()
        self.width, self.cos_first, self.shift = width, cos_first, shift

    def forward(self, time: Real[Tensor, " b"]) -> Float[Tensor, "b w"]:
        half = self.width // 2
        index = torch.arange(half, dtype=torch.float32, device=time.device)
        angle = time.float()[:, None] * torch.exp(-math.log(10000) * index / (half - self.shift))
        waves = [angle.cos(), angle.sin()] if self.cos_first else [angle.sin(), angle.cos()]
        return F.pad(torch.cat(waves, 1), (0, self.width % 2))


class Fourier(nn.Module):
    r"""Sines and cosines of the logarithm of the time (or of the time) at fixed random frequencies.

    [sin(2 pi w log t), cos(2 pi w log t)],    w ~ N(0, scale^2)                                        (5)

    Arguments:
        frequencies: Number of frequencies; there are twice as many features.
        scale: Their standard deviation.
        log: Take the logarithm of the time, as for a noise level.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix C
        https://arxiv.org/abs/2011.13456
    """

    def __init__(self, frequencies: int, scale: float = 16.0, log: bool = True) -> None:
        super().__init__()
        self.log = log
        self.weight = nn.Parameter(torch.randn(frequencies) * scale, requires_grad=False)

    def forward(self, time: Real[Tensor, " b"]) -> Float[Tensor, "b w"]:
        angle = (time.log() if self.log else time)[:, None] * self.weight * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], 1)


class TimeEmbedding(nn.Module):
    """Two linear layers with an activation between them, from features to an embedding.

    Arguments:
        features: Channels of the features.
        width: Channels of the embedding.
        act: The activation.
        cond_dim: Channels of a second vector, which is projected and added to the features; None for no such.
    """

    def __init__(self, features: int, width: int, act: str = "silu", cond_dim: int | None = None) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.linear_1 = Linear(features, width)
        self.cond_proj = None if cond_dim is None else Linear(cond_dim, features, bias=False)
        self.linear_2 = Linear(width, width)

    def forward(self, features: Float[Tensor, "b f"], cond: Float[Tensor, "b d"] | None = None) -> Float[Tensor, "b w"]:
        features = features.to(self.linear_1.weight.dtype)
        if self.cond_proj is not None and cond is not None:
            features = features + self.cond_proj(cond.to(features.dtype))
        return self.linear_2(self.act(self.linear_1(features)))


# Place ----------------------------------------------------------------------------------------


class Places(nn.Module):
    r"""Where each pixel is: coordinates from -1 to 1 and their waves, mixed by a matrix that the embedding changes.

    y = (W + M emb) [1, u, v, sin(pi k u), cos(pi k u), sin(pi k v), cos(pi k v)],    k = 1, 2, 4           (6)

    The coordinates are shares of the sides, so that a corner is the same corner in an image of another size. As
    words meet places in a product, "left" has but to be learned as a factor of u; without M, what words for places
    say has no first-order effect on what is drawn where, and training stands still for thousands of steps.

    Arguments:
        channels: Channels of y.
        time_channels: Width of the embedding; M starts at zero.

    Example:
        >>> Places(8, 16)(torch.zeros(2, 3, 4, 5), torch.zeros(2, 16)).shape
        torch.Size([2, 8, 4, 5])
    """

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        waves = 3 + 4 * len(PLACE_WAVES)
        self.proj = Linear(waves, channels, bias=False)
        self.told = zeroed(Linear(time_channels, waves * channels, bias=False))

    def forward(self, x: SizeOf, emb: Float[Tensor, "b t"]) -> Float[Tensor, "b c h2 w2"]:
        """Return y (B, channels, H, W) for images (B, C, H, W) and embeddings (B, time_channels)."""
        v, u = (2 * (torch.arange(n, device=x.device) + 0.5) / n - 1 for n in x.shape[2:])
        one = torch.ones(len(v), len(u), 1, device=x.device)
        waves = torch.cat([one, axis_waves(u).expand(len(v), -1, -1), axis_waves(v)[:, None].expand(-1, len(u), -1)], 2)
        matrix = self.proj.weight + self.told(emb).unflatten(1, self.proj.weight.shape)
        y = waves.to(matrix.dtype).flatten(0, 1) @ matrix.mT
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


PLACE_WAVES = (1, 2, 4)


def axis_waves(u: Float[Tensor, " n"]) -> Float[Tensor, "n w"]:
    """Return a coordinate (n,) and its sines and cosines (n, 1 + 2 waves)."""
    angles = torch.stack([math.pi * u * wave for wave in PLACE_WAVES], 1)  # no copy to a device
    return torch.cat([u[:, None], angles.sin(), angles.cos()], 1)


# Labels ---------------------------------------------------------------------------------------


def checked(index: Tensor, table: nn.Embedding, what: str) -> Tensor:
    """Return an index into a table's rows as int64, having refused one that has no row.

    The look at the numbers costs a wait for a GPU, which checks for itself; there it is left out.

    Raises:
        UsageError: An index is not a whole number from 0 to the last row.
    """
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = index[(index < 0) | (index >= table.num_embeddings) | (index != index.long())]
        if len(wrong):
            raise UsageError(f"{what} {wrong[0].item()} is not one of 0 .. {table.num_embeddings - 1}")
    return index.long()


# Resampling -----------------------------------------------------------------------------------
# Any size n >= 1 is halved to ceil(n / 2), and the doubled image is cropped to the size it came from.


def halve(x: Image) -> Resized:
    """Average 2x2 pixels, and those that there are at an odd edge."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def double(x: Image) -> Resized:
    """Repeat each pixel 2x2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def crop(x: Image, like: SizeOf) -> Resized:
    """Cut x to the height and width of another image; no copy, and nothing to do where they agree."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else x[:, :, :height, :width]


class Downsample(nn.Module):
    """A convolution with stride 2.

    Arguments:
        channels: Channels in and out.
        padding: One pixel on every side (1), or at the right and the bottom only (0).
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Image) -> Resized:
        if self.padding == 0:
            x = F.pad(x, (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2))
        return self.conv(x)


class Upsample(nn.Module):
    """Each pixel repeated 2x2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Image, like: SizeOf | None = None) -> Resized:
        """Double x, and crop it to the size of `like` where that is given."""
        x = double(x)
        return self.conv(x if like is None else crop(x, like))


# The residual block ---------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    r"""Two convolutions with the time between them, beside a shortcut.

    h = conv_1(act(norm_1(x))),    y = (shortcut(x) + conv_2(drop(act(norm_2(h, emb))))) / scale_out,      (7)

    where the time is added, norm_2(h + W emb), or scales and shifts, norm_2(h) (1 + W_1 emb) + W_2 emb.

    Arguments:
        in_channels, out_channels: The shortcut is a 1x1 convolution where they differ.
        time_channels: Width of the embedding, which comes with its activation already applied; None for a
            block without a time, as an autoencoder has them.
        groups: Groups of the first norm and, unless groups_out is given, of the second.
        scale_shift: The time scales and shifts instead of being added.
        scale_out: What the sum is divided by.
        resample: Applied to both branches: `halve`, `double`, or another.
        shortcut: A 1x1 convolution even where the channels agree.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int | None,
        *,
        groups: int,
        groups_out: int | None = None,
        eps: float = 1e-5,
        act: str = "silu",
        dropout: float = 0.0,
        scale_shift: bool = False,
        scale_out: float = 1.0,
        resample: Resample | None = None,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.act, self.scale_shift, self.scale_out, self.resample = act, scale_shift, scale_out, resample
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups_out or groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = None
        if shortcut or in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Image, emb: Float[Tensor, "b t"] | None = None, like: SizeOf | None = None) -> AnyImage:
        """Return y; with a resampling, both branches are cropped to the size of `like` where it is given."""
        h = self.norm1(x, self.act)
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        if like is not None:
            x, h = crop(x, like), crop(h, like)
        h = self.conv1(h)
        h = self.conv2(self.dropout(self.timed(h, emb)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.scale_out == 1 else (x + h) / self.scale_out

    def timed(self, h: Image, emb: Float[Tensor, "b t"] | None) -> Image:
        """Return the second norm of h, activated, with what the time says where the block has one."""
        if self.time_emb_proj is None:
            return self.norm2(h, self.act)
        time = self.time_emb_proj(emb)[:, :, None, None]
        return self.norm2(h, self.act, *time.chunk(2, 1)) if self.scale_shift else self.norm2(h, self.act, add=time)
