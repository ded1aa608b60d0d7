"""One step of Stable Diffusion's U-Net at full size, ours beside diffusers', in one run, on a CPU or a GPU.

    python benchmarks/stable_diffusion.py --dtype bfloat16 --json stable.json

Random weights of the real architecture (859,520,964 numbers; `--xl`: 2,567,463,684), the same in all; a guided step is
the same latent of 64x64 (128x128) twice, with two texts; `--apart`: two latents. `--dtype` is what all compute in:
diffusers in eager PyTorch, OpenVINO by its hint, ours packed as `--speed fast` packs it. On a GPU there are also
diffusers under torch.compile (mode reduce-overhead, channels innermost), and ours without its recorded calls. Turns
alternate, the first of each is left out; relative error is to diffusers' float32. `--clock cpu` counts the processor's
time instead of the wall's, where others use the machine. `--size` and `--width` make it smaller.
"""

import argparse
import copy
import gc
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from report import gpu_or_not, machine, table, versions

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
XL = CONFIG | {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Told(NamedTuple):
    """What a step is given, by our names.

    Arguments:
        x: Latents (2, 4, h, w).
        time: Their times (2,).
        context: The text's tokens (2, 77, D).
        added: XL's vector of the text and its six sizes.
    """

    x: torch.Tensor
    time: torch.Tensor
    context: torch.Tensor
    added: dict[str, torch.Tensor]

    def to(self, dtype: torch.dtype) -> "Told":
        """Return it in another dtype; the time stays as it is."""
        added = {name: value.to(dtype) for name, value in self.added.items()}
        return Told(self.x.to(dtype), self.time, self.context.to(dtype), added)

    def channels_last(self) -> "Told":
        """Return it with the latents' channels innermost."""
        return self._replace(x=self.x.to(memory_format=torch.channels_last))


def told(xl: bool, size: int, device: str, apart: bool) -> Told:
    """Return what a step is given, the same on every device."""
    torch.manual_seed(1)
    x, time = torch.randn(2, 4, size, size), torch.tensor([500.0, 500.0])
    x = x if apart else x[:1].repeat(2, 1, 1, 1)
    context = torch.randn(2, 77, 2048 if xl else 768)
    added = {"pooled": torch.randn(2, 1280), "sizes": torch.full((2, 6), 8.0 * size)} if xl else {}
    return Told(x.to(device), time.to(device), context.to(device), {k: v.to(device) for k, v in added.items()})


def build(config: dict, device: str = "cpu") -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return diffusers' U-Net with random weights, and ours with the same tensors."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(config)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours


def theirs_of(network: torch.nn.Module, given: Told) -> torch.Tensor:
    """Return what diffusers' network says."""
    more = None
    if given.added:
        more = {"text_embeds": given.added["pooled"], "time_ids": given.added["sizes"]}
    return network(given.x, given.time, given.context, added_cond_kwargs=more, return_dict=False)[0]


def gpu_peers(
    theirs: torch.nn.Module, ours: torch.nn.Module, given: Told, options: argparse.Namespace
) -> dict[str, Callable]:
    """Return calls on a GPU: ours recorded and not, diffusers' as it is and compiled."""
    from reverie.networks.replayed import Replayed

    graphs, last = Replayed(ours), given.channels_last()
    dtype = getattr(torch, options.dtype)
    same, cast = theirs.to(dtype), given.to(dtype)
    compiled = torch.compile(copy.deepcopy(same).to(memory_format=torch.channels_last), mode="reduce-overhead")
    every = {
        "reverie": lambda: graphs(last.x, last.time, context=last.context, **last.added),
        "reverie, not recorded": lambda: ours(last.x, last.time, context=last.context, **last.added),
        "diffusers": lambda: theirs_of(same, cast),
        "diffusers, compiled": lambda: theirs_of(compiled, cast.channels_last()),
    }
    return {name: call for name, call in every.items() if name.split(", ")[-1] not in options.without.split(",")}


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


def cpu_peers(
    theirs: torch.nn.Module, ours: torch.nn.Module, given: Told, options: argparse.Namespace, preparation: dict
) -> dict[str, Callable]:
    """Return calls on a CPU: ours, OpenVINO's, diffusers'; what the second takes before is put into preparation."""
    dtype, without, last = getattr(torch, options.dtype), options.without.split(","), given.channels_last()
    peers: dict[str, Callable] = {}
    found = None if "openvino" in without or options.xl else openvino(theirs, given[:3], dtype, options.threads)
    if found is not None:
        peers["openvino"], preparation["openvino"] = found
    peers["reverie"] = lambda: ours(last.x, last.time, context=last.context, **last.added)
    if "diffusers" not in without:
        theirs.to(dtype)
        cast = given.to(dtype)
        peers["diffusers"] = lambda: theirs_of(theirs, cast)
    return peers


def seconds_of(call: Callable, clock: Callable[[], float]) -> tuple[float, torch.Tensor]:
    """Return how long a call takes, its GPU waited for, and its answer."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    y = call()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began, y.clone()


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--xl", action="store_true", help="Stable Diffusion XL's U-Net")
    parser.add_argument("--size", type=int, help="latents a side")
    parser.add_argument("--apart", action="store_true", help="two latents, of which nothing can be shared")
    parser.add_argument("--width", type=int, default=320, help="channels of the first level")
    parser.add_argument("--without", default="", help="peers to leave out, with commas: diffusers, openvino, compiled")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def turns(
    peers: dict[str, Callable], runs: int, clock: Callable[[], float], wanted: torch.Tensor, preparation: dict
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of all in turn, and their errors; the first of each, which prepares, is put beside them."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    errors = {}
    for turn in range(runs + 1):
        for name, call in peers.items():
            took, y = seconds_of(call, clock)
            seconds[name].append(took)
            if turn == 0:
                preparation[name] = preparation.get(name, 0) + took
            if runs <= 10 or turn == 0:
                print(f"{name} {took:.4g} s", file=sys.stderr, flush=True)
            errors[name] = float((y.double() - wanted.double()).norm() / wanted.double().norm())
    return seconds, errors


@torch.inference_mode()
def main() -> None:
    """Run, print a table, write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = gpu_or_not()
    config = XL if options.xl else CONFIG
    widths = [options.width * factor for factor in (1, 2, 4, 4)[: len(config["down_block_types"])]]
    heads = {"attention_head_dim": [width // 64 for width in widths]} if options.xl else {}
    theirs, ours = build(config | {"block_out_channels": widths} | heads, device)
    given = told(options.xl, options.size or (128 if options.xl else 64), device, options.apart)
    dtype, preparation = getattr(torch, options.dtype), {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        wanted = theirs_of(theirs, given).float()
    began = time.perf_counter()
    if device == "cuda":
        pack(ours.requires_grad_(False), dtype)
        preparation["reverie"] = time.perf_counter() - began
        peers = gpu_peers(theirs, ours, given, options)
    else:
        peers = cpu_peers(theirs, ours, given, options, preparation)
        began = time.perf_counter()
        pack(ours.requires_grad_(False), dtype)
        preparation["reverie"] = time.perf_counter() - began
    gc.collect()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    seconds, errors = turns(peers, options.runs, clock, wanted, preparation)
    medians = {name: statistics.median(took[1:]) for name, took in seconds.items()}
    base = medians.get("diffusers", medians["reverie"])
    rows = [
        [name, f"{1000 * medians[name]:.4g}", f"{medians[name] / base:.2f}", f"{errors[name]:.1e}",
         f"{preparation[name]:.1f}"]
        for name in peers
    ]  # fmt: skip
    print(table(["network", "ms a step", "of diffusers", "relative error", "preparation, s"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"seconds": seconds, "medians": medians, "errors": errors, "preparation": preparation, "peak_mib": peak}
        options.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
