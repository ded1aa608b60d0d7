r"""Attention over the pixels of an image, alone or in a transformer that also looks at a context.

The pixels of an image (B, C, H, W) are read as H W tokens of C channels, a view where the image is in
channels-last. `SpatialAttention` is the attention of DDPM's U-Net; `SpatialTransformer` is that of latent
diffusion: for each of its blocks

    x = x + self_attention(norm(x)),    x = x + cross_attention(norm(x), context),    x = x + mlp(norm(x)),    (1)

where the mlp has gated hidden units, mlp(x) = W_3 (W_1 x * gelu(W_2 x)).

Attention is softmax(q k^T / sqrt(d)) v. Within `unmixed` the softmax of chosen self-attentions is replaced by the
identity: each pixel sees its own value alone, which is what perturbed-attention guidance leads away from.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B
    https://arxiv.org/abs/2006.11239
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.3 and appendix E
    https://arxiv.org/abs/2112.10752
    Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance (Ahn et al., 2024), section 4
    https://arxiv.org/abs/2403.17377
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from reverie.kernels import attention, gated, linear, self_attention
from reverie.networks.layers import GroupNorm, Image, LayerNorm, Linear, Resized, SizeOf, added, repeated, zeroed

Tokens = Float[Tensor, "b n c"]
Contexts = Float[Tensor, "k l d"]  # one for each sample; or more, where the samples stand for several

# The self-attentions that mix nothing now. Of the context and not of the modules: another thread's call of the same
# network is not changed, and nothing is left behind in them.
_UNMIXED: ContextVar[frozenset[nn.Module]] = ContextVar("unmixed", default=frozenset())


def pixel_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """Return a network's self-attentions over the pixels of its image, by their place.

    Example:
        >>> list(pixel_attentions(SpatialTransformer(8, heads=2, head_dim=4, context_dim=6, groups=4)))
        ['transformer_blocks.0.attn1']
    """
    return {name: part for name, part in network.named_modules() if getattr(part, "over_pixels", False)}


@contextmanager
def unmixed(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which self-attentions return their values as they are: their map is the identity.

    Arguments:
        attentions: Some of those that `pixel_attentions` names.

    Example:
        >>> one = SpatialAttention(8, heads=2, head_dim=4)
        >>> x = torch.randn(1, 8, 2, 2)
        >>> with unmixed([one]):
        ...     alone = one(x)
        >>> alone.shape
        torch.Size([1, 8, 2, 2])
    """
    token = _UNMIXED.set(_UNMIXED.get() | frozenset(attentions))
    try:
        yield
    finally:
        _UNMIXED.reset(token)


def mixes(attention: nn.Module) -> bool:
    """Whether a self-attention does what it does, as it does but within `unmixed`."""
    return torch.compiler.is_compiling() or attention not in _UNMIXED.get()


def to_tokens(x: Image) -> Tokens:
    """Read an image (B, C, H, W) as tokens (B, H W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tokens, like: SizeOf) -> Resized:
    """Read tokens (B, H W, C) as an image in channels-last, of the height and width of another."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Queries from tokens, keys and values from the same tokens or from a context.

    Arguments:
        channels: Channels of the tokens, in and out.
        heads: Number of heads.
        head_dim: Channels of a head.
        context_dim: Channels of the context; None attends to the tokens themselves.
        bias: Biases in the queries, keys and values.

    Attributes:
        over_pixels: Whether its tokens are an image's pixels, which see each other.
        joined: One layer for queries, keys and values of the same tokens, where it was given one.
        known: The keys and values of contexts, where it is to remember them.
    """

    over_pixels = False

    def __init__(
        self, channels: int, heads: int, head_dim: int, context_dim: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, heads * head_dim, bias=bias)
        self.to_k = Linear(context_dim or channels, heads * head_dim, bias=bias)
        self.to_v = Linear(context_dim or channels, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(heads * head_dim, channels)])
        self.joined: nn.Module | None = None
        self.known: WeakIdKeyDictionary | None = None

    def forward(self, x: Tokens, context: Float[Tensor, "b l d"] | None = None, onto: Tokens | None = None) -> Tokens:
        """Return what the tokens see in the context, or in themselves; added to other tokens, where they are given."""
        seen = self._seen(x, context)
        return self.to_out[0](seen) if onto is None else added(onto, self.to_out[0], seen)

    def _seen(self, x: Tokens, context: Float[Tensor, "b l d"] | None) -> Float[Tensor, "b n hd"]:
        """Return the sums of the values, a head's beside another's."""
        if context is not None:
            return attention(self.to_q(x), *self._of_context(context), self.heads)
        return self_attention(self._fused(x), self.heads) if mixes(self) else self._values(x)

    def join(self, layer: nn.Module) -> None:
        """Have queries, keys and values of the same tokens made by one layer, which is given, instead of three."""
        self.joined = layer
        del self.to_q, self.to_k, self.to_v

    def remember(self) -> None:
        """Work keys and values out once for each context, as long as there is that tensor, and unchanged."""
        self.known = WeakIdKeyDictionary()

    def _of_context(self, context: Float[Tensor, "b l d"]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context."""
        if self.known is None:
            return self.to_k(context), self.to_v(context)
        version = 0 if context.is_inference() else context._version
        found = self.known.get(context)
        if found is None or found[0] != version:
            found = version, self.to_k(context), self.to_v(context)
            self.known[context] = found
        return found[1:]

    def _values(self, x: Tokens) -> Tokens:
        """Return the values of tokens."""
        return self.to_v(x) if self.joined is None else self.joined(x).chunk(3, -1)[2]

    def _fused(self, x: Tokens) -> Float[Tensor, "b n qkv"]:
        """Return queries, keys and values of the same tokens, which are read once, side by side."""
        if self.joined is not None:
            return self.joined(x)
        parts = self.to_q, self.to_k, self.to_v
        weight = torch.cat([part.weight for part in parts])
        bias = None if self.to_q.bias is None else torch.cat([part.bias for part in parts])
        return linear(x, weight, bias)


class SpatialAttention(Attention):
    """Self-attention over the pixels of an image, with its norm and its residual.

    Arguments:
        channels: Channels in and out.
        heads: Number of heads.
        head_dim: Channels of a head.
        groups: Groups of the norm before it; None for no norm.
        eps: The norm's.
        scale_out: What the sum is divided by.

    Example:
        >>> SpatialAttention(8, heads=2, head_dim=4, groups=4)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    over_pixels = True

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        groups: int | None = None,
        eps: float = 1e-5,
        scale_out: float = 1.0,
    ) -> None:
        super().__init__(channels, heads, head_dim)
        zeroed(self.to_out)
        self.scale_out = scale_out
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)

    def forward(self, x: Image, context: None = None) -> Image:  # type: ignore[override]
        h = x if self.group_norm is None else self.group_norm(x)
        y = to_image(super().forward(to_tokens(h), onto=to_tokens(x)), x)
        return y if self.scale_out == 1 else y / self.scale_out


class Gate(nn.Module):
    """W_1 x * gelu(W_2 x), the two matrices in one."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tokens) -> Float[Tensor, "b n hidden"]:
        return gated(self.proj(x))


class GatedMLP(nn.Module):
    """W_3 (W_1 x * gelu(W_2 x)), four times as wide inside; the places are those of diffusers' feed-forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gate(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels))

    def forward(self, x: Tokens, onto: Tokens) -> Tokens:
        """Return it, added to other tokens."""
        return added(onto, self.net[2], self.net[1](self.net[0](x)))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and the gated mlp: equation (1)."""

    def __init__(self, channels: int, heads: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads, head_dim, bias=False)
        self.attn1.over_pixels = True
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, head_dim, context_dim, bias=False)
        self.norm3 = LayerNorm(channels)
        self.ff = GatedMLP(channels)

    def forward(self, x: Tokens, context: Contexts) -> Float[Tensor, "k n c"]:
        x = repeated(self.attn1(self.norm1(x), onto=x), len(context))
        x = self.attn2(self.norm2(x), context, onto=x)
        return self.ff(self.norm3(x), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of an image, with a context for each sample.

    With k times as many contexts as samples, the batch is repeated k times where a context is first looked at, as if
    it had been before: sample b is in rows b, b + B, and so on.

    Arguments:
        channels: Channels in and out.
        heads: Number of heads.
        head_dim: Channels of a head; the tokens have heads * head_dim channels inside.
        context_dim: Channels of the context.
        blocks: Number of transformer blocks.
        groups: Groups of the norm at the start.
        linear_projection: Linear layers instead of 1x1 convolutions at both ends; the function is the
            same, the shape of the weights is not.

    Example:
        >>> transformer = SpatialTransformer(8, heads=2, head_dim=4, context_dim=6, blocks=1, groups=4)
        >>> transformer(torch.randn(2, 8, 3, 5), torch.randn(2, 7, 6)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        blocks: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, inner) if linear_projection else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(inner, heads, head_dim, context_dim) for _ in range(blocks)]
        )
        self.proj_out = zeroed(Linear(inner, channels) if linear_projection else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Image, context: Contexts) -> Float[Tensor, "k c h w"]:
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear_projection else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        x = repeated(x, len(context))
        if self.linear_projection:
            return to_image(added(to_tokens(x), self.proj_out, tokens), x)
        return added(x, self.proj_out, to_image(tokens, x))
