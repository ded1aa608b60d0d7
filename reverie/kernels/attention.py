r"""Attention in blocks: scores never leave the nearest cache.

    y = softmax(q k^T / sqrt(D) + mask) v, for each head of width D                                      (1)

The twin is PyTorch's scaled_dot_product_attention. The library's is exact too: the softmax's sums are carried along
the blocks of keys and put right as the largest score grows; the gradients compute the scores once more. Its
accumulation is in float32, whatever the inputs are. A query that may look at nothing sees zero, in both.

A gradient of the gradient goes by (1) itself, in PyTorch's operators.

References:
    FlashAttention (Dao et al., 2022), algorithms 1 and 4
    https://arxiv.org/abs/2205.14135
    Online normalizer calculation for softmax (Milakov & Gimelshein, 2018)
    https://arxiv.org/abs/1805.02867
"""

import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reverie.kernels.dispatch import call, fast, has, integers, pointer

Queries = Float[Tensor, "b n c"]
Keys = Float[Tensor, "b m c"]
Mask = Bool[Tensor, "#b #h #n m"] | Float[Tensor, "#b #h #n m"]


def attention(q: Queries, k: Keys, v: Keys, heads: int, mask: Mask | None = None) -> Queries:
    """Let each of n tokens look at m tokens, with the channels cut into heads: equation (1).

    Arguments:
        q: Queries (B, N, C), in any strides.
        k, v: Keys and values (B, M, C).
        heads: Number of heads H; it divides C.
        mask: What may be looked at (True), or what is added to the scores: (B, H, N, M), each of the first three 1
            where it is the same for all.

    Returns:
        What the tokens see (B, N, C), of q's dtype.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> attention(x, x, x, heads=4).shape
        torch.Size([2, 5, 8])
    """
    if 0 in (*q.shape, *k.shape) or not fast(q, k, v):
        return plain(q, k, v, heads, mask)
    dtype = q.dtype
    if not all(in_bfloat16(tokens) for tokens in (q, k, v)):
        q, k, v = (tokens.float() for tokens in (q, k, v))
    if mask is not None and mask.requires_grad:  # a learned bias
        return plain(q, k, v, heads, mask).to(dtype)
    return Attend.apply(q, k, v, added(mask), heads).to(dtype)


def self_attention(qkv: Float[Tensor, "b n c3"], heads: int) -> Queries:
    """Let tokens look at themselves, their queries, keys and values side by side, as one matrix gives them.

    Example:
        >>> self_attention(torch.randn(2, 5, 24), heads=4).shape
        torch.Size([2, 5, 8])
    """
    if 0 in qkv.shape or not fast(qkv):
        return plain(*parts(qkv), heads)
    return AttendSelf.apply(qkv if in_bfloat16(qkv) else qkv.float(), heads).to(qkv.dtype)


def plain(q: Queries, k: Keys, v: Keys, heads: int, mask: Mask | None = None) -> Queries:
    """The twin: the same by PyTorch."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16 and q.requires_grad:
        q, k, v = q.float(), k.float(), v.float()  # its backward pass takes two to four times as long in bfloat16
    q, k, v = (cut(tokens, heads) for tokens in (q, k, v))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2).to(dtype)


def by_formula(q: Queries, k: Keys, v: Keys, heads: int, mask: Tensor | None = None) -> Queries:
    """Equation (1) in operators that can be differentiated any number of times."""
    q, k, v = (cut(tokens, heads) for tokens in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
        scores = scores.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0)
    y = scores.softmax(-1) @ v
    if mask is not None:
        y = y.masked_fill((mask == -math.inf).all(-1, keepdim=True), 0)
    return y.transpose(1, 2).flatten(2)


def cut(tokens: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b h n d"]:
    """View the channels as heads."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values that lie side by side, as views."""
    q, k, v = qkv.chunk(3, -1)
    return q, k, v


def added(mask: Tensor | None) -> Tensor | None:
    """Return a mask as what is added to the scores, in float32."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)


def in_bfloat16(tokens: Tensor) -> bool:
    """Whether the library multiplies these numbers as they are."""
    return tokens.dtype == torch.bfloat16 and has("reverie_attention_bfloat16")


# The library's ------------------------------------------------------------------------------------


class Call:
    """The arguments that the library's two functions share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> None:
        batch, queries, channels = q.shape
        self.width = channels // heads
        # The library reads a token's channels where they lie side by side, whatever lies between tokens.
        self.tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
        strides = [stride for x in self.tokens for stride in (x.stride(0), self.width, x.stride(1))]
        full = (batch, heads, queries, k.shape[1])
        mask_strides = [0] * 4 if mask is None else list(mask.expand(full).stride())
        self.arguments = (
            integers(batch, heads, queries, k.shape[1], self.width),
            *map(pointer, self.tokens),
            integers(*strides),
            pointer(mask),
            integers(*mask_strides),
            ctypes.c_float(1 / math.sqrt(self.width)),
        )
        self.suffix = "_bfloat16" if q.dtype == torch.bfloat16 else ""
        self.out_shape, self.lse_shape = (batch, queries, channels), (batch, heads, queries)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return what the tokens see, and the logarithm of each query's sum."""
        out, lse = torch.empty(self.out_shape, dtype=self.tokens[0].dtype), torch.empty(self.lse_shape)
        call("reverie_attention" + self.suffix, *self.arguments, pointer(out), pointer(lse))
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of queries, keys and values."""
        strides = ctypes.c_int64(dq.stride(1)), ctypes.c_int64(dk.stride(1))
        given = map(pointer, (out, dout, lse, dq, dk, dv))
        call("reverie_attention_backward" + self.suffix, *self.arguments, *given, *strides)


class Attend(torch.autograd.Function):
    """Attention by the library, with its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> Tensor:
        out, lse = Call(q, k, v, mask, heads).forward()
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*again(lambda q, k, v: by_formula(q, k, v, ctx.heads, mask), (q, k, v), dout), None, None)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        Call(q, k, v, mask, ctx.heads).backward(out, lse, dout.contiguous(), dq, dk, dv)
        return dq, dk, dv, None, None


class AttendSelf(torch.autograd.Function):
    """The same where queries, keys and values are one tensor, and so is its gradient: nothing is copied together."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        out, lse = Call(*parts(qkv), None, heads).forward()
        ctx.save_for_backward(qkv, out, lse)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*again(lambda qkv: by_formula(*parts(qkv), ctx.heads), (qkv,), dout), None)
        gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
        call = Call(*parts(qkv), None, ctx.heads)
        call.backward(out, lse, dout.contiguous(), *parts(gradient))
        return gradient, None


def again(function: Any, inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of a function by PyTorch, so that they can be differentiated themselves."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, dout, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
