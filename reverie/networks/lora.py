r"""LoRA: a change of a weight that has low rank, trained while the weight itself stays as it is.

    W' = W + scale B A,    scale = alpha / rank,                                                            (1)

with A (rank, inputs) and B (outputs, rank). A convolution's A is itself a convolution with rank channels
out, and B one with 1x1 pixels; where a file keeps the pixels in a third factor, the product is

    (B T A)_oikl = sum_mn B_om T_mnkl A_ni.                                                                 (2)

The change is made to the weight, as a parametrization of it, and not to the layer's output: so it also
acts where a layer's weight is read without calling the layer, as attention does with its queries, keys and
values, and what is trained is what is merged.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022), section 4.1
    https://arxiv.org/abs/2106.09685
    LyCORIS: Navigating Text-To-Image Customization (Yeh et al., 2024), section 3.2 and appendix C for (2)
    https://arxiv.org/abs/2309.14859
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reverie.base.errors import UsageError
from reverie.base.registry import nearest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Factors(NamedTuple):
    """The factors of one weight's change.

    Arguments:
        up: B: (O, R), or (O, R, 1, 1).
        down: A: (R, I), or (R, I, K, L).
        scale: What the product is multiplied by.
        mid: T: (R, R, K, L), where the pixels have a factor of their own.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the product."""
        pixels = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *pixels)

    def added(self, weight: Tensor, factor: float = 1.0) -> Tensor:
        """Return a weight with the change added, times a factor: equations (1) and (2)."""
        up, down = (matrix.flatten(1).to(weight) for matrix in (self.up, self.down))
        if self.mid is None:
            return torch.addmm(weight.flatten(1), up, down, alpha=factor * self.scale).reshape(weight.shape)
        change = torch.einsum("om,mnkl,ni->oikl", up, self.mid.to(weight), down)
        return weight + factor * self.scale * change.reshape(weight.shape)


def updated(weight: Tensor, updates: Iterable[tuple[float, Factors]]) -> Tensor:
    """Return a weight with changes added, each times its own factor, in float32 or better.

    Example:
        >>> updated(torch.zeros(2, 2), [(0.5, Factors(torch.ones(2, 1), torch.ones(1, 2), 2.0))]).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    with torch.autocast(weight.device.type, enabled=False):  # what is trained is what is merged
        for factor, change in updates:
            total = change.added(total, factor)
    return total.to(weight.dtype)


class Adapter(nn.Module):
    """The trained change of one weight: a parametrization of it.

    Arguments:
        weight: The weight, of a linear layer or a convolution.
        rank: Rows of A and columns of B.
        alpha: The product is multiplied by alpha / rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        ones = [1] * (weight.ndim - 2)
        self.lora_A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank, *ones))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as a linear layer's; B = 0 changes nothing yet

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight: equation (1)."""
        return updated(weight, [(1.0, self.factors())])

    def factors(self) -> Factors:
        """Return A, B and the scale."""
        return Factors(self.lora_B, self.lora_A, self.scale)


def add_lora(
    network: nn.Module, rank: int = 8, alpha: float | None = None, targets: Sequence[str] = ATTENTION
) -> list[str]:
    """Give weights of a network a trainable change of low rank, and freeze all else.

    Arguments:
        network: The network; it is changed in place. Its state dict has other names then: `base_state_dict`
            returns the ones from before.
        rank: Rank of each change.
        alpha: The change is multiplied by alpha / rank; the rank, unless given.
        targets: The last parts of the layers' names, as PEFT's `target_modules`: "to_q" is every layer that
            is called so.

    Returns:
        The names of the layers that were changed.

    Raises:
        UsageError: A target is no linear layer or convolution, or the network has an adapter already.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> add_lora(network, rank=2, targets=["0"]), [name for name, _ in trained(network)]
        (['0'], ['0'])
    """
    alpha = float(rank) if alpha is None else alpha
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"rank is {rank} and alpha {alpha}; both must be above 0")
    if next(trained(network), None) is not None:
        raise UsageError("the network has LoRA adapters already; merge or remove them first")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    chosen = {target: [n for n in layers if n == target or n.endswith("." + target)] for target in targets}
    missing = [target for target, names in chosen.items() if not names]
    if missing or not targets:
        known = sorted({name.rpartition(".")[2] for name in layers})
        close = nearest(missing[0], known) if missing else ""
        raise UsageError(f"the network has no linear layer or convolution called {', '.join(missing) or 'so'}{close}")
    names = [name for name in layers if any(name in found for found in chosen.values())]
    if grouped := [name for name in names if getattr(layers[name], "groups", 1) != 1]:
        raise UsageError(f"{grouped[0]} is a convolution in groups, which LoRA does not change; leave it out")
    network.requires_grad_(False)
    for name in names:
        layer = layers[name]
        parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank, alpha))
    return names


def trained(network: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield each adapter with the name of its layer."""
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            adapters = layer.get_submodule("parametrizations.weight").children()
            yield from ((name, adapter) for adapter in adapters if isinstance(adapter, Adapter))


def remove_lora(network: nn.Module, merge: bool = False) -> None:
    """Take the adapters off: the weights are those of before, bit for bit, or with the changes merged.

    Raises:
        UsageError: There are none.
    """
    names = [name for name, _ in trained(network)]
    if not names:
        raise UsageError("the network has no LoRA adapters")
    for name in names:
        layer = network.get_submodule(name)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=merge)


def base_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict without its adapters, under the names of before."""
    return {
        name.replace(".parametrizations.weight.original", ".weight"): value
        for name, value in network.state_dict().items()
        if not name.endswith((".lora_A", ".lora_B"))
    }


def lora_state_dict(network: nn.Module, part: str = "unet") -> dict[str, Tensor]:
    """Return the adapters as PEFT and diffusers name them.

    The scale is put into B, so that a reader that knows of no alpha (which is then the rank) reads the same
    change.

    Arguments:
        network: The network.
        part: What it is in a pipeline of diffusers: unet, text_encoder or text_encoder_2; "" for PEFT's own.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 2))
        >>> _ = add_lora(network, rank=1, targets=["0"])
        >>> {name: tuple(value.shape) for name, value in lora_state_dict(network).items()}
        {'unet.0.lora_A.weight': (1, 3), 'unet.0.lora_B.weight': (2, 1)}
    """
    start = f"{part}." if part else "base_model.model."
    state = {}
    for name, adapter in trained(network):
        state[f"{start}{name}.lora_A.weight"] = adapter.lora_A.detach().clone()
        state[f"{start}{name}.lora_B.weight"] = adapter.scale * adapter.lora_B.detach()
    return state
