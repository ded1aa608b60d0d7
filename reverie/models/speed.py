"""How a model computes: exactly, as it does unless asked otherwise, or as fast as the machine can.

Fast, on a CPU: bfloat16 where the processor multiplies it natively; the networks' weights held once, in that, and
laid out for oneDNN or transformed for convolutions with fewer multiplications; norms, softmax and whatever adds up in
float32; schedules and the sampler's state as ever; batches of any size, so that the two branches of guidance are one
call and nothing is padded; CLIP's encoders let go once the prompts are read; the memory that a step frees kept by the
process for the next. On a GPU: the same networks in bfloat16, norms and gates by `reverie.kernels.gpu`, and a step's
kernels started as one (`reverie.networks.replayed`). Elsewhere, and for other networks: the network under autocast.
What it costs is the rounding, and that the last bits of a sample may depend on its batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.kernels.memory import keep_freed_memory
from reverie.models.memory import gigabytes
from reverie.networks.packed import Packed, Packing, pack, packable
from reverie.networks.replayed import Replayed

if TYPE_CHECKING:
    from reverie.models.model import Model

SPEEDS = ("exact", "fast")
WEIGHTS = ("int8",)


@dataclass(frozen=True)
class Speed:
    """How a model computes.

    Arguments:
        name: "exact" or "fast".
        dtype: What a fast network computes in; None for float32.
        weights: "int8" for a network whose weights are held in eight bits.
        packed: Whether its weights are laid out for speed, and can be neither trained, moved nor saved.
        packing: What became of them.
        graphs: The network with its kernels started as one, on a GPU.
    """

    name: str = "exact"
    dtype: torch.dtype | None = None
    weights: str | None = None
    packed: bool = False
    packing: Packing | None = None
    graphs: Replayed | None = field(default=None, repr=False)

    def words(self) -> str:
        """Return it in a sentence."""
        kind = "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if not self.packed or self.packing is None:
            return f"fast: {kind} under autocast, batches of any size"
        size, whole = self.packing.bytes, 4 * self.packing.numbers
        text = f"fast: {kind}, weights laid out once, {gigabytes(size)} instead of {gigabytes(whole)}"
        text = text if self.graphs is None else f"{text}, a step's kernels started as one"
        return text + (f", in 8 bits: {100 * self.packing.error:.2g} % off" if self.weights else "")


EXACT = Speed()


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: AVX512-BF16, AMX, or ARM's."""
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in PyTorch 2.10
    asked = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return asked or any(bool(told.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what a fast network computes in on a device; None for float32."""
    if device.type == "cpu":
        return torch.bfloat16 if native_bfloat16() else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None


def hasten(model: "Model", dtype: torch.dtype | None = None, weights: str | None = None, chosen: bool = False) -> Speed:
    """Make a model fast. Its weights' sha256 stays what it was.

    Arguments:
        model: The model, on its device; a network that is packed can be neither trained, moved nor saved after that.
        dtype: What it is to compute in; None for float32, if that was chosen, and else the best of the device.
        weights: "int8" to hold its network's weights in eight bits.
        chosen: Whether dtype was.

    Returns:
        How it computes now.

    Raises:
        UsageError: There is nothing to hold in eight bits, or it is fast already.
    """
    if model.speed != EXACT:
        raise UsageError("the model is fast already; load it again to make it so otherwise")
    found = dtype if chosen else fast_dtype(model.device)
    network = model.denoiser.network
    packs = model.device.type in ("cpu", "cuda") and bool(packable(network)) and found != torch.float16
    if weights is not None and not packs:
        raise UsageError(
            f"weights {weights} has no effect on a {model.card.network.name} on {model.device}; leave it out"
        )
    model.keep_identity()
    model.denoiser.dtype = found
    if not packs:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    packing = pack_network(network, found, weights == "int8") if packs else None
    if model.codec is not None:
        hasten_codec(model, found)
    if model.conditioner is not None:
        model.conditioner.rests = model.device.type == "cpu"
    graphs = Replayed(network) if packs and model.device.type == "cuda" else None
    if model.device.type == "cpu":
        keep_freed_memory()
    model.speed = Speed("fast", found, weights, packs, packing, graphs)
    return model.speed


@contextmanager
def arithmetic(device: torch.device, speed: Speed) -> Iterator[None]:
    """A block in which a GPU multiplies as a speed has it: exactly is float32 throughout, in an order that holds."""
    if device.type != "cuda":
        yield
        return
    exact = speed.name == "exact"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not exact
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=exact, allow_tf32=not exact):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def pack_network(network: nn.Module, dtype: torch.dtype | None, bits8: bool) -> Packing:
    """Pack a network, whose parameters are frozen."""
    network.eval().requires_grad_(False)
    with torch.no_grad():
        return pack(network, dtype or torch.float32, bits8)


def hasten_codec(model: "Model", dtype: torch.dtype | None) -> None:
    """Make a model's codec fast: its weights are never in eight bits, which pictures would show."""
    assert model.codec is not None
    if model.device.type in ("cpu", "cuda") and packable(model.codec.network) and dtype != torch.float16:
        pack_network(model.codec.network, dtype, False)
    else:
        model.codec.dtype = dtype
        model.codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def is_packed(network: nn.Module) -> bool:
    """Whether a network's weights are laid out for speed."""
    return any(isinstance(module, Packed) for module in network.modules())


def refuse_packed(model: Any, what: str) -> None:
    """Refuse what can't be done with weights that are laid out for speed.

    Raises:
        UsageError: They are.
    """
    if model.speed.packed:
        raise UsageError(f"a model that was loaded with speed fast can't be {what}; load it with speed exact")


def settle_speed(speed: str, weights: str | None) -> None:
    """Refuse a speed, or a way to hold weights, that there is not, or that would have no effect.

    Raises:
        UsageError: It is so.
    """
    if speed not in SPEEDS:
        raise UsageError(f"speed is {speed!r}; it must be one of {', '.join(SPEEDS)}")
    if weights is not None and weights not in WEIGHTS:
        raise UsageError(f"weights is {weights!r}; it must be {', '.join(WEIGHTS)}, or left out")
    if weights is not None and speed != "fast":
        raise UsageError(f"weights {weights} changes the picture, which speed exact does not; ask for speed fast")
