"""One step of Stable Diffusion 1.5's U-Net at full size, ours beside diffusers', in one run.

    python benchmarks/stable_diffusion.py --dtype bfloat16 --json stable.json

Random weights of the real architecture (859,520,964 numbers), the same in all; a guided step is a batch of 2 latents
of 64x64. `--dtype` is what all compute in: diffusers in eager PyTorch, OpenVINO by its hint, ours packed as `--speed
fast` packs it. Turns alternate, the first of each is left out; relative error is to diffusers' float32. `--clock cpu`
counts the processor's time instead of the wall's, where others use the machine. `--size` and `--width` make it smaller.
"""

import argparse
import gc
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine, table, versions

from reverie.networks.packed import pack
from reverie.networks.unet import UNet
from reverie.networks.unet_config import UNetConfig

PACKAGES = ("reverie", "torch", "diffusers", "openvino")
CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def build(config: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return diffusers' U-Net with random weights, and ours with the same tensors."""
    import diffusers

    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(config)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours


def openvino(
    network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, threads: int
) -> tuple[Callable, float] | None:
    """Return OpenVINO's call of a network in some dtype, and the seconds that its preparation took; None without it."""
    try:
        import openvino as ov
    except ImportError:
        return None
    began = time.perf_counter()
    model = ov.convert_model(Returns(network), example_input=inputs)
    hint = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.compile_model(model, "CPU", settings)
    seconds = time.perf_counter() - began
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: torch.from_numpy(compiled(arrays)[0]), seconds


class Returns(torch.nn.Module):
    """diffusers' network, its output a plain tensor."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.network(x, time, context, return_dict=False)[0]


@torch.inference_mode()
def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=64, help="latents a side")
    parser.add_argument("--width", type=int, default=320, help="channels of the first level")
    parser.add_argument("--without", default="", help="peers to leave out, with commas: diffusers, openvino")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    widths = [options.width * factor for factor in (1, 2, 4, 4)]
    theirs, ours = build(CONFIG | {"block_out_channels": widths})
    torch.manual_seed(1)
    x, when = torch.randn(2, 4, options.size, options.size), torch.tensor([500.0, 500.0])
    context = torch.randn(2, 77, 768)
    dtype = getattr(torch, options.dtype)
    without, preparation = options.without.split(","), {}
    wanted = theirs(x, when, context, return_dict=False)[0]
    peers: dict[str, Callable] = {}
    if "openvino" not in without and (found := openvino(theirs, (x, when, context), dtype, options.threads)):
        peers["openvino"], preparation["openvino"] = found
    began = time.perf_counter()
    pack(ours.requires_grad_(False), dtype)
    preparation["reverie"] = time.perf_counter() - began
    peers["reverie"] = lambda: ours(x.to(memory_format=torch.channels_last), when, context=context)
    if "diffusers" not in without:
        theirs.to(dtype)
        given = x.to(dtype), when, context.to(dtype)
        peers["diffusers"] = lambda: theirs(*given, return_dict=False)[0]
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    errors = {}
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for _ in range(options.runs + 1):
        for name, call in peers.items():
            began = clock()
            y = call()
            seconds[name].append(clock() - began)
            print(f"{name} {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
            errors[name] = float((y - wanted).norm() / wanted.norm())
    medians = {name: statistics.median(turns[1:]) for name, turns in seconds.items()}
    base = medians.get("diffusers", medians["reverie"])
    rows = [
        [
            name,
            f"{medians[name]:.2f}",
            f"{medians[name] / base:.2f}",
            f"{errors[name]:.1e}",
            f"{preparation.get(name, 0):.1f}",
        ]
        for name in peers
    ]
    print(table(["network", "s a step", "of diffusers", "relative error", "preparation, s"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"seconds": seconds, "medians": medians, "errors": errors, "preparation": preparation, "peak_mib": peak}
        options.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
