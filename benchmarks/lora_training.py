"""One training step of a LoRA on Stable Diffusion 1.5's U-Net at full size: ours beside diffusers with PEFT, in turns.

    python benchmarks/lora_training.py --json lora.json

A step: noise on random latents of 64x64, the network forward and backward, AdamW on the adapter (rank 4, of the
queries, keys, values and outputs of every attention, 797,184 numbers), the loss of the noise. Random weights of the
real architecture (859,520,964 numbers), the same in all. Each is what the project gives: diffusers' network with its
`add_adapter`, ours as `reverie train --lora` makes it, with its layout and its kernels. `-bf16` is autocast, which is
how both train with it. With `--checkpointing` each keeps only the states between its layers. The first turn of each
is left out. PEFT is no dependency of ours: without it there is nothing to compare with, and the script says so.
"""

import argparse
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from report import gpu_or_not, machine, table, versions
from stable_diffusion import CONFIG, build

from reverie.kernels.dispatch import status
from reverie.kernels.memory import keep_freed_memory
from reverie.networks.lora import add_lora

PACKAGES = ("reverie", "torch", "diffusers", "peft")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4
Step = Callable[[bool], float]


def trainer(network: torch.nn.Module, call: Callable, inputs: dict[str, torch.Tensor], rate: float = 1e-4) -> Step:
    """Return a step of training of what is left to train, in bfloat16 or not: it returns the loss."""
    adam = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate, fused=True)
    x0, eps = inputs["x0"], inputs["eps"]

    def step(half: bool) -> float:
        with torch.autocast(x0.device.type, torch.bfloat16) if half else nullcontext():
            loss = (call(0.7 * x0 + 0.7 * eps).float() - eps).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> int:
    """Run, print a table, write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="latents a side")
    parser.add_argument("--width", type=int, default=320, help="channels of the first level")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    parser.add_argument("--only", default="diffusers,diffusers-bf16,ours,ours-bf16", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = gpu_or_not()
    theirs, ours = build(CONFIG | {"block_out_channels": [options.width * factor for factor in (1, 2, 4, 4)]})
    theirs, ours = theirs.to(device).train(), ours.to(device).to(memory_format=torch.channels_last).train()
    torch.manual_seed(1)
    shape = (options.batch_size, 4, options.size, options.size)
    inputs = {name: torch.randn(shape, device=device) for name in ("x0", "eps")}
    when = torch.full((options.batch_size,), 500.0, device=device)
    context = torch.randn(options.batch_size, 77, 768, device=device)

    add_lora(ours, RANK, targets=TARGETS)
    ours.gradient_checkpointing = options.checkpointing
    last = {name: value.to(memory_format=torch.channels_last) for name, value in inputs.items()}
    steps: dict[str, Step] = {"ours": trainer(ours, lambda x: ours(x, when, context=context), last)}
    try:
        from peft import LoraConfig
    except ImportError:
        print("peft is not installed: nothing to compare with (pip install peft)", file=sys.stderr)
    else:
        theirs.requires_grad_(False)
        theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
        if options.checkpointing:
            theirs.enable_gradient_checkpointing()
        called = lambda x: theirs(x, when, context, return_dict=False)[0]  # noqa: E731
        steps["diffusers"] = trainer(theirs, called, inputs)

    names = [name for name in options.only.split(",") if name.removesuffix("-bf16") in steps]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.runs + 1):
        for name in names:
            began = time.perf_counter(), time.process_time()
            losses[name].append(steps[name.removesuffix("-bf16")](name.endswith("-bf16")))
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            seconds[name] += [took] if turn else []
            print(f"turn {turn}, {name}: {took[0]:.1f} s, {took[1]:.1f} of the CPU's", file=sys.stderr, flush=True)
    reference = next((name for name in names if name.startswith("diffusers")), names[0])
    wall, cpu = ({n: statistics.median(t[i] for t in took) for n, took in seconds.items()} for i in (0, 1))
    rows = [
        [n, f"{wall[n]:.2f}", f"{cpu[n]:.2f}", f"{cpu[reference] / cpu[n]:.2f}", f"{losses[n][0]:.4f}"] for n in names
    ]
    print(table(["network", "s a step", "CPU-s", f"x {reference}, CPU", "first loss"], rows))
    if options.json:
        about = {
            "benchmark": "lora_training", "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": machine(), "versions": versions(PACKAGES), "kernels": status(), "threads": options.threads,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }  # fmt: skip
        options.json.write_text(json.dumps(about | {"seconds": seconds, "losses": losses}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
