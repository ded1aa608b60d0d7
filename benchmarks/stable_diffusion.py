"""One step of Stable Diffusion's U-Net at full size, ours beside diffusers', in one run, on a CPU or a GPU.

    python benchmarks/stable_diffusion.py --dtype bfloat16 --json stable.json

Random weights of the real architecture (859,520,964 numbers; `--xl`: 2,567,463,684), the same in all; a guided step is
the same latent of 64x64 (128x128) twice, with two texts; `--apart`: two latents. `--dtype` is what all compute in:
diffusers in eager PyTorch, OpenVINO by its hint, ours packed as `--speed fast` packs it. On a GPU there are also
diffusers under torch.compile (mode reduce-overhead, channels innermost), and ours without its recorded calls. Each has
a process of its own, as it would have in use: ours keeps the memory that it frees, which is a process's setting. Turns
alternate, the first of each is left out; relative error is to diffusers' float32. `--clock cpu` counts the processor's
time instead of the wall's, where others use the machine. `--size` and `--width` make it smaller.
"""

import argparse
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import gpu_or_not, machine, table, versions

from reverie.kernels.memory import keep_freed_memory
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


def openvino(
    network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, threads: int
) -> Callable[[], torch.Tensor]:
    """Return OpenVINO's call of a network in some dtype."""
    import openvino as ov

    model = ov.convert_model(Returns(network), example_input=inputs)
    hint = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.compile_model(model, "CPU", settings)
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: torch.from_numpy(compiled(arrays)[0])


class Returns(torch.nn.Module):
    """diffusers' network, its output a plain tensor."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.network(x, time, context, return_dict=False)[0]


def networks(options: argparse.Namespace, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return diffusers' network and ours, as the options have them."""
    config = XL if options.xl else CONFIG
    widths = [options.width * factor for factor in (1, 2, 4, 4)[: len(config["down_block_types"])]]
    heads = {"attention_head_dim": [width // 64 for width in widths]} if options.xl else {}
    return build(config | {"block_out_channels": widths} | heads, device)


def asked(options: argparse.Namespace, device: str) -> Told:
    """Return what a step is given, as the options have it."""
    return told(options.xl, options.size or (128 if options.xl else 64), device, options.apart)


def contestants(options: argparse.Namespace, device: str) -> list[str]:
    """Return who takes part."""
    names = ["reverie", "diffusers"]
    if device == "cuda":
        names = ["reverie", "reverie, not recorded", "diffusers", "diffusers, compiled"]
    elif not options.xl and find_spec("openvino"):
        names = ["openvino", *names]
    return [name for name in names if name.split(", ")[-1] not in options.without.split(",")]


def call_of(name: str, theirs: torch.nn.Module, ours: torch.nn.Module, given: Told, options: argparse.Namespace) -> Any:
    """Return a contestant's call, ready."""
    from reverie.networks.replayed import Replayed

    dtype, last = getattr(torch, options.dtype), given.channels_last()
    if name == "openvino":
        return openvino(theirs, given[:3], dtype, options.threads)
    if name.startswith("reverie"):
        pack(ours.requires_grad_(False), dtype)
        keep_freed_memory()
        network = Replayed(ours) if given.x.is_cuda and "not recorded" not in name else ours
        return lambda: network(last.x, last.time, context=last.context, **last.added)
    cast, same = given.to(dtype), theirs.to(dtype)
    if "compiled" not in name:
        return lambda: theirs_of(same, cast)
    compiled = torch.compile(same.to(memory_format=torch.channels_last), mode="reduce-overhead")
    return lambda: theirs_of(compiled, cast.channels_last())


@torch.inference_mode()
def contest(name: str, options: argparse.Namespace, device: str, pipe: Connection) -> None:
    """Prepare one contestant and take its turns: a process's work."""
    torch.set_num_threads(options.threads)
    theirs, ours = networks(options, device)
    given, began = asked(options, device), time.perf_counter()
    call = call_of(name, theirs, ours, given, options)
    prepared = time.perf_counter() - began
    del theirs, ours
    pipe.send(prepared)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    while pipe.recv():
        took, y = seconds_of(call, clock)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        pipe.send((took, y.float().cpu().numpy(), peak))


def seconds_of(call: Callable[[], torch.Tensor], clock: Callable[[], float]) -> tuple[float, torch.Tensor]:
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


class Found(NamedTuple):
    """What became of a contestant.

    Arguments:
        seconds: Of its turns; the first is part of its preparation.
        preparation: Seconds before the second turn.
        error: Relative, to diffusers' float32.
        peak_mib: Its process's memory at most, its making included.
    """

    seconds: list[float]
    preparation: float
    error: float
    peak_mib: float


def turns(names: list[str], options: argparse.Namespace, device: str, wanted: torch.Tensor) -> dict[str, Found]:
    """Return what became of all, who take turns."""
    context = torch.multiprocessing.get_context("spawn")
    pipes, found = {}, {}
    for name in names:
        pipes[name], far = context.Pipe()
        context.Process(target=contest, args=(name, options, device, far), daemon=True).start()
        found[name] = Found([], pipes[name].recv(), 0.0, 0.0)
    for turn in range(options.runs + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            took, y, peak = pipe.recv()
            if options.runs <= 10 or turn == 0:
                print(f"{name} {took:.4g} s", file=sys.stderr, flush=True)
            before = found[name]
            error = float((torch.from_numpy(y).double() - wanted.double()).norm() / wanted.double().norm())
            preparation = before.preparation + (took if turn == 0 else 0)
            found[name] = Found([*before.seconds, took], preparation, error, peak)
    for pipe in pipes.values():
        pipe.send(False)
    return found


@torch.inference_mode()
def truth(options: argparse.Namespace, device: str) -> torch.Tensor:
    """Return diffusers' answer in float32."""
    theirs, _ = networks(options, device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        return theirs_of(theirs, asked(options, device)).float().cpu()


def main() -> None:
    """Run, print a table, write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = gpu_or_not()
    wanted = truth(options, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    found = turns(contestants(options, device), options, device, wanted)
    medians = {name: statistics.median(one.seconds[1:]) for name, one in found.items()}
    base = medians.get("diffusers", medians["reverie"])
    rows = [
        [name, f"{1000 * medians[name]:.4g}", f"{medians[name] / base:.3f}", f"{one.error:.1e}",
         f"{one.preparation:.1f}", f"{one.peak_mib:.0f}"]
        for name, one in found.items()
    ]  # fmt: skip
    print(table(["network", "ms a step", "of diffusers", "relative error", "preparation, s", "peak MiB"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES), "medians": medians}
        told_of = {name: one._asdict() for name, one in found.items()}
        options.json.write_text(json.dumps(about | {"contestants": told_of}, indent=1) + "\n")


if __name__ == "__main__":
    main()
