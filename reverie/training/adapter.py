"""Training an adapter alone: what of it a checkpoint holds, and what a run leaves.

A checkpoint holds the merged weights, so that it is a model like any other, and the factors beside them, which is
what a run goes on with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from reverie.base.randomness import torch_seed
from reverie.base.storage import write_file
from reverie.models.checkpoints import Checkpoint, check_tensors, safetensors_writer
from reverie.networks.lora import add_lora, lora_state_dict
from reverie.training.config import TrainConfig
from reverie.training.ema import EMA

FILE = "lora.safetensors"
GROUP = "adapter"


def adapt(network: nn.Module, config: TrainConfig) -> None:
    """Give a network the adapter that is asked for, if any, and freeze all else.

    Raises:
        UsageError: It has no attention to adapt.
    """
    if config.lora is None:
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(config.seed, "lora"))
        add_lora(network, config.lora, config.lora_alpha)


def merged(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state under the names of before, a copy with the adapter merged into the weights.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = add_lora(network, rank=1, targets=["0"])
        >>> list(merged(network)), bool((merged(network)["0.weight"] == network[0].weight).all())
        (['0.weight'], True)
    """
    found = {}
    for name, value in network.state_dict().items():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        layer, original, _ = name.partition(".parametrizations.weight.original")
        weight = network.get_submodule(layer).weight if original else value
        assert isinstance(weight, Tensor)
        found[f"{layer}.weight" if original else name] = weight.detach().clone()
    return found


def factors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a state is the adapter's."""
    return {name: value for name, value in state.items() if name.endswith((".lora_A", ".lora_B"))}


def groups(network: nn.Module, averages: Sequence[EMA]) -> dict[str, dict[str, Tensor]]:
    """Return a checkpoint's tensors: the merged weights, those of the averages, and the factors of each."""
    found = {"model": merged(network), GROUP: factors(network.state_dict())}
    for ema in averages:
        with ema.applied(network):
            found[ema.name] = merged(network)
        found[f"{GROUP}-{ema.name}"] = factors(ema.state())
    return found


@torch.no_grad()
def restore(network: nn.Module, averages: Sequence[EMA], checkpoint: Checkpoint) -> None:
    """Take up the factors of a checkpoint; all else is the model's that was started from.

    Raises:
        ModelFileError: They are those of another adapter.
    """
    places = {GROUP: factors(network.state_dict())}
    places |= {f"{GROUP}-{ema.name}": factors(ema.state()) for ema in averages}
    for group, own in places.items():
        saved = checkpoint.tensors(group)
        check_tensors(own, saved, str(checkpoint.path))
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def write_adapter(network: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's layout, as diffusers names its parts.

    Raises:
        StorageError: The disk is full, read-only, gone or faulty.
    """
    state = {name: value.contiguous() for name, value in lora_state_dict(network).items()}
    write_file(folder / FILE, safetensors_writer(state), sum(value.nbytes for value in state.values()))
