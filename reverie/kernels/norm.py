r"""Group norm with all that stands around it in a residual block, in two walks over memory.

    u = (x + add - mean_g) / sqrt(var_g + eps),    y = act((u w + b) (1 + scale) + shift)                (1)

The twin is PyTorch's group norm with its neighbours, each a walk over memory or two of its own. The library's is for
images in channels-last, in float32 or bfloat16, with the addition, scale and shift one number for each sample and
channel. Nothing between x and y is kept for the gradients, which compute u once more. On a GPU, where no gradient is
asked for, it is Triton's (`reverie.kernels.gpu`).

A gradient of the gradient goes by the twin.

References:
    Group Normalization (Wu & He, 2018), equations 1 and 6
    https://arxiv.org/abs/1803.08494
    Algorithms for computing the sample variance (Chan, Golub & LeVeque, 1979): block by block
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.kernels import gpu
from reverie.kernels.attention import again
from reverie.kernels.dispatch import address, call, fast, pointer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}
FUSED = {None, "silu", "swish"}  # activations that the library has

PerChannel = Float[Tensor, " c"]
Modulation = Float[Tensor, "b c ..."]


def group_norm(
    x: Float[Tensor, "b c ..."],
    groups: int,
    weight: PerChannel | None,
    bias: PerChannel | None,
    eps: float,
    act: str | None = None,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
    add: Modulation | None = None,
) -> Float[Tensor, "b c ..."]:
    """Normalise each group of channels, scale and shift, and apply the activation: equation (1).

    Arguments:
        x: Anything with samples and channels first.
        groups: Groups of channels; their number divides the channels.
        weight, bias: One for each channel; None for 1 and 0.
        eps: What is added to a variance.
        act: A name of `ACTIVATIONS`, or None.
        scale: What the normalised x is multiplied by, less one; it comes with a shift.
        shift: What is added then.
        add: What is added to x before all.

    Returns:
        y, of x's shape, dtype and layout.

    Example:
        >>> group_norm(torch.randn(2, 8, 4, 4), 4, torch.ones(8), torch.zeros(8), 1e-5, "silu").shape
        torch.Size([2, 8, 4, 4])
    """
    others = (weight, bias, scale, shift, add)
    on_gpu = gpu.serves(x, *others)
    if not (channels_last(x) and all(map(per_channel, (scale, shift, add))) and (on_gpu or fast(x, *others))):
        return plain(x, groups, *others[:2], eps, act, *others[2:])
    weight, bias, scale, shift, add = (
        None if y is None else y.flatten(1).float() if y.ndim > 1 else y.float() for y in others
    )
    compute = gpu.group_norm if on_gpu else Normalise.apply
    y = compute(x, groups, weight, bias, eps, act in ("silu", "swish"), scale, shift, add)
    return y if act in FUSED else ACTIVATIONS[act](y)  # type: ignore[index]


def channels_last(x: Tensor) -> bool:
    """Whether x is an image with its channels innermost, and not empty."""
    return x.ndim == 4 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


def per_channel(modulation: Tensor | None) -> bool:
    """Whether a modulation is one number for each sample and channel."""
    return modulation is None or modulation[0, 0].numel() == 1


def plain(
    x: Float[Tensor, "b c ..."],
    groups: int,
    weight: PerChannel | None,
    bias: PerChannel | None,
    eps: float,
    act: str | None = None,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
    add: Modulation | None = None,
) -> Float[Tensor, "b c ..."]:
    """The twin: the same by PyTorch."""
    dtype = x.dtype
    if add is not None:
        x = x + add
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad:
        # Its backward pass in channels-last takes two to four times as long in bfloat16, the casts included.
        x, weight, bias = (None if y is None else y.float() for y in (x, weight, bias))  # type: ignore[assignment]
    if x.is_cuda and weight is not None:
        x = x.to(weight.dtype)  # there PyTorch takes no mixture
    # torch.group_norm is F.group_norm without its check for one value in a group, which a 1x1 image may have.
    y = torch.group_norm(x, groups, weight, bias, eps).to(dtype)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift, y, 1 + scale)
    return ACTIVATIONS[act](y) if act else y


# The library's ------------------------------------------------------------------------------------


class Norm(ctypes.Structure):
    """What csrc/norm.h calls by that name."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "pixels", "channels", "groups")),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("add", "weight", "bias", "scale", "shift", "mean", "rstd")),
    )


class Gradients(ctypes.Structure):
    """What csrc/norm.h calls NormGradients."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift", "add"))


def described(x: Tensor, groups: int, eps: float, silu: bool, given: dict[str, Tensor | None]) -> Norm:
    """Return the library's description of a norm; the tensors given must outlive it."""
    samples, channels, height, width = x.shape
    return Norm(samples, height * width, channels, groups, eps, silu, **{name: address(y) for name, y in given.items()})


class Normalise(torch.autograd.Function):
    """Group norm by the library, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
        scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mean, rstd = torch.empty(2, len(x), groups)
        given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "add": add}
        given = {name: None if y is None else y.contiguous() for name, y in given.items()}
        norm = described(x, groups, eps, silu, {**given, "mean": mean, "rstd": rstd})
        y = torch.empty_like(x)
        call("reverie_norm", ctypes.byref(norm), pointer(x), pointer(y), int(x.dtype == torch.bfloat16))
        ctx.save_for_backward(x, weight, bias, scale, shift, add, mean, rstd)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, add, mean, rstd = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        if torch.is_grad_enabled():
            dx, dw, db, *rest = twice(x, groups, weight, bias, eps, silu, scale, shift, add, dy)
            return dx, None, dw, db, None, None, *rest
        given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "add": add}
        given = {name: None if y is None else y.contiguous() for name, y in given.items()}
        norm = described(x, groups, eps, silu, {**given, "mean": mean, "rstd": rstd})
        sums = {name: None if y is None else torch.empty(x.shape[:2]) for name, y in given.items()}
        gradients = Gradients(**{name: address(y) for name, y in sums.items()})
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        described_both = ctypes.byref(norm), ctypes.byref(gradients)
        call("reverie_norm_backward", *described_both, *map(pointer, (x, dy, dx)), int(x.dtype == torch.bfloat16))
        dw, db = (None if y is None else y.sum(0) for y in (sums["weight"], sums["bias"]))
        return dx, None, dw, db, None, None, sums["scale"], sums["shift"], sums["add"]


def twice(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    scale: Tensor | None, shift: Tensor | None, add: Tensor | None, dy: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients by the twin, so that they can be differentiated themselves."""
    tensors = [x, weight, bias, scale, shift, add]
    there = {index: tensor for index, tensor in enumerate(tensors) if tensor is not None}

    def function(*given: Tensor) -> Tensor:
        full: list[Any] = [None] * 6
        for index, tensor in zip(there, given, strict=True):
            full[index] = tensor if index < 3 else tensor[:, :, None, None]
        return plain(full[0], groups, full[1], full[2], eps, "silu" if silu else None, *full[3:])

    found = again(function, tuple(there.values()), dy)
    gradients: list[Tensor | None] = [None] * 6
    for index, gradient in zip(there, found, strict=True):
        gradients[index] = gradient
    return gradients
