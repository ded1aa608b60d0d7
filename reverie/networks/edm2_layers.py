r"""Layers that keep the magnitude of what they are given: those of EDM2.

The magnitude of x is its root mean square; each layer is made so that activations of magnitude 1 that are
independent of each other come out with magnitude 1. There are no biases, and no norm with statistics of its own.

    unit:     x / (eps + sqrt(mean x^2)),    eps = 10^-4    (pixel norm over channels; cosine attention over a head)
    weight:   w_i / (eps sqrt(n) + |w_i|) for each output i with n inputs,    w_i <- unit(w_i) after each update
                                                                                    (eq. 47 and 66)
    Fourier:  sqrt 2 cos(2 pi (f c + p)),    f ~ N(0, 1), p ~ U(0, 1)               (eq. 75)
    SiLU:     silu(x) / 0.596                                                       (eq. 81)
    sum:      ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                             (eq. 88)
    concat:   sqrt((n_a + n_b) / ((1 - t)^2 + t^2)) [(1 - t) a / sqrt(n_a), t b / sqrt(n_b)]    (eq. 103)

A weight is stored with magnitude 1, hence of length sqrt(n), so that a learning rate is the relative size of an
update; what multiplies the input has length 1. As a length does not matter to the output, the gradient has no part
along the weight, and each update would lengthen it: so it is brought back to 1 after each (`after_update`).

References:
    Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2023), section 2 and appendix B
    https://arxiv.org/abs/2312.02696
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from reverie.networks.attention import mixes, to_image, to_tokens
from reverie.networks.layers import Image, attention

EPS = 1e-4
SILU_GAIN = 0.596  # the magnitude of silu(z) for z ~ N(0, 1)

Values = Float[Tensor, "..."]


def magnitude(x: Values, dims: Sequence[int]) -> Values:
    """Return the root mean square of x over some dimensions, kept with length 1, in float32 at least.

    Example:
        >>> magnitude(torch.tensor([[3.0, 4.0]]), [1])
        tensor([[3.5355]])
    """
    count = math.prod(x.shape[dim] for dim in dims)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=list(dims), keepdim=True, dtype=wide) / math.sqrt(count)


def unit(x: Values, dims: Sequence[int]) -> Values:
    """Return x scaled to magnitude 1 over some dimensions; where it is zero it stays so.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]]), [1]).square().mean().sqrt()
        tensor(1.0000)
    """
    return x / (EPS + magnitude(x, dims)).to(x.dtype)


def pixel_norm(x: Image) -> Image:
    """Return an image (B, C, H, W) whose channels have magnitude 1 at each pixel."""
    return unit(x, [1])


def mp_silu(x: Values) -> Values:
    """Return silu(x) / 0.596, of magnitude 1 where x is standard normal."""
    return F.silu(x) / SILU_GAIN


def mp_sum(a: Values, b: Values, t: float = 0.5) -> Values:
    """Return the blend of two tensors, t of it the second, of magnitude 1 where they are independent.

    Example:
        >>> mp_sum(torch.tensor(1.0), torch.tensor(-1.0), t=0.25)
        tensor(0.6325)
    """
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Float[Tensor, "b m *s"], b: Float[Tensor, "b n *s"], t: float = 0.5) -> Float[Tensor, "b k *s"]:
    """Return two tensors side by side in dimension 1, scaled so that a share of t of the whole is the second's.

    Each part's contribution to what a layer makes of them is then (1 - t)^2 to t^2, however many channels it has.
    """
    count_a, count_b = a.shape[1], b.shape[1]
    scale = math.sqrt(count_a + count_b) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(count_a)), b * (scale * t / math.sqrt(count_b))], 1)


class MPFourier(nn.Module):
    """Cosines of a number at fixed random frequencies and phases, in float32: eq. 75.

    Arguments:
        features: Number of features.

    Example:
        >>> MPFourier(64)(torch.zeros(2)).shape
        torch.Size([2, 64])
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features))
        self.register_buffer("phases", torch.rand(features))

    def forward(self, c: Real[Tensor, " b"]) -> Float[Tensor, "b f"]:
        wide = torch.promote_types(self.frequencies.dtype, torch.float32)
        turns = c.to(wide)[:, None] * self.frequencies.to(wide) + self.phases.to(wide)
        return math.sqrt(2) * (2 * math.pi * turns).cos()


class MPWeight(nn.Module):
    """A linear layer or a convolution without bias, whose weight has length 1 for each output: eq. 47.

    Arguments:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Height and width of a convolution, odd; None is a linear layer.

    Example:
        >>> layer = MPWeight(8, 16, kernel=3)
        >>> layer(torch.randn(2, 8, 5, 5)).shape, layer.effective().flatten(1).norm(dim=1)[0]
        (torch.Size([2, 16, 5, 5]), tensor(0.9999, grad_fn=<SelectBackward0>))
    """

    def __init__(self, inputs: int, outputs: int, kernel: int | None = None) -> None:
        super().__init__()
        shape = (outputs, inputs) if kernel is None else (outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape))
        self.after_update()

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring each output's weight back to magnitude 1: eq. 66. Training calls it after each update."""
        self.weight.copy_(unit(self.weight, range(1, self.weight.ndim)))

    def effective(self, gain: float | Tensor = 1.0) -> Tensor:
        """Return what the input is multiplied by: weights of length 1 for each output, times a gain."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return unit(wide, range(1, wide.ndim)) * (gain / math.sqrt(wide[0].numel()))

    def forward(self, x: Float[Tensor, "b i ..."], gain: float | Tensor = 1.0) -> Float[Tensor, "b o ..."]:
        """Return the layer's output times a gain, which is applied to the weight: of the two the smaller."""
        weight = self.effective(gain).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class CosineAttention(nn.Module):
    """Self-attention over an image's pixels with queries, keys and values of magnitude 1 in each head.

    With head width d the logits are sqrt(d) cos(q, k): they cannot grow as training goes on.

    Arguments:
        channels: Channels in and out.
        heads: Number of heads, a divisor of the channels.

    Example:
        >>> CosineAttention(8, heads=2)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    over_pixels = True

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = MPWeight(channels, 3 * channels, kernel=1)
        self.out = MPWeight(channels, channels, kernel=1)

    def forward(self, x: Image) -> Image:
        parts = to_tokens(self.qkv(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = unit(parts, [-1]).flatten(-2).unbind(2)
        seen = attention(q, k, v, self.heads) if mixes(self) else v
        return self.out(to_image(seen, x))


class Uncertainty(nn.Module):
    """u(c): how hard it is to denoise at each noise level, as the logarithm of a loss; learned along with a network.

    Arguments:
        features: Number of Fourier features of the clock c.

    Example:
        >>> Uncertainty(64)(torch.zeros(3)).shape
        torch.Size([3])
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.fourier = MPFourier(features)
        self.linear = MPWeight(features, 1)

    def forward(self, clock: Real[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return u (B,) at the network's clock (B,)."""
        return self.linear(self.fourier(clock))[:, 0]
