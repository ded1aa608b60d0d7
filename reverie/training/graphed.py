"""A network on a GPU that is trained with its kernels started as one, forward and backward: CUDA's graphs.

A small network's step is over on a GPU before Python has named its operators. PyTorch records the kernels of a call and
those of its gradients, and plays them at the next: the numbers are the same. It serves where a step is one call of the
network, of the same shapes each time, whose randomness is the caller's.

References:
    Accelerating PyTorch with CUDA Graphs
    https://docs.pytorch.org/docs/stable/notes/cuda.html#partial-network-capture
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reverie.networks.unet import UNet
from reverie.training.config import TrainConfig

MOST = 2  # sets of shapes that are recorded; calls of further ones are plain


def graphs(network: nn.Module, config: TrainConfig, device: torch.device) -> bool:
    """Whether a run's steps are such that its network's calls can be recorded."""
    plain = config.objective == "simple" and config.dropout == 0 and config.accumulate == 1
    return device.type == "cuda" and plain and not config.checkpointing and isinstance(network, UNet)


class Graphed(nn.Module):
    """A network whose calls and gradients in training are recorded; others are its own.

    Arguments:
        network: The network, on a GPU.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.recorded: dict[tuple[object, ...], Callable[..., Tensor]] = {}

    def forward(self, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        """Return the network's answer."""
        given = {"x": x, "time": time, **told}
        key = tuple((name, value.shape, value.stride(), value.dtype) for name, value in given.items())
        known = key in self.recorded or len(self.recorded) < MOST
        if not (known and self.training and torch.is_grad_enabled()):
            return self.network(**given)
        if key not in self.recorded:
            self.recorded[key] = record(self.network, given)
        return self.recorded[key](*given.values())


class InOrder(nn.Module):
    """A network that is given its arguments by their places, as PyTorch records them.

    Arguments:
        network: The network.
        names: Those of its arguments.
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *given: Tensor) -> Tensor:
        """Return the network's answer."""
        return self.network(**dict(zip(self.names, given, strict=True)))


def record(network: nn.Module, given: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Return the recorded call of a network with tensors of these shapes."""
    # Recording is done beside the stream of the later calls, of which PyTorch would warn at each run.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    held = tuple(value.detach().clone() for value in given.values())
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # Casts that are kept from call to call would be those of the first weights.
    with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
        return torch.cuda.make_graphed_callables(  # type: ignore[return-value]
            InOrder(network, tuple(given)), held, allow_unused_input=True
        )
