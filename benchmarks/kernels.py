r"""The kernels by shape: time forward and backward, and error, beside the plain twin's.

    python benchmarks/kernels.py --json kernels.json

Times are the process's own CPU time with one thread, medians of runs in which the two take turns: what else the machine
does disturbs both alike. Errors are the largest difference from the same in float64 over the largest value, of the
output and of the worst of its gradients. Shapes are those of a small U-Net's training step (batch 64, 32x32) and of
Stable Diffusion 1.5 (batch 2, latents of 64x64). Convolutions are those of packed weights, forward alone: oneDNN's
(plain) and Winograd's (fast); `--only convolution`. Those of a weight that is trained, in bfloat16 with all gradients:
PyTorch's (plain) and with the weight's by Winograd's (fast); `--only trained`.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import machine, table, versions
from torch import Tensor

from reverie.kernels import dispatch, winograd
from reverie.kernels.attention import by_formula
from reverie.kernels.convolution import convolution as trained
from reverie.kernels.linear import convolution
from reverie.kernels.packed import blocks_of_convolution, convolve

attention_of, norm_of = (sys.modules[f"reverie.kernels.{name}"] for name in ("attention", "norm"))

ATTENTION = {  # samples, heads, queries, keys, channels of a head
    "small U-Net, 16x16": (64, 8, 256, 256, 8),
    "small U-Net, 8x8": (64, 8, 64, 64, 8),
    "one head of 64": (4, 1, 1024, 1024, 64),
    "SD 1.5, 64x64": (2, 8, 4096, 4096, 40),
    "SD 1.5, 32x32": (2, 8, 1024, 1024, 80),
    "SD 1.5, 16x16": (2, 8, 256, 256, 160),
    "SD 1.5, 64x64, 77 words": (2, 8, 4096, 77, 40),
    "SD 1.5, 32x32, 77 words": (2, 8, 1024, 77, 80),
}
NORM = {  # samples, channels, size, groups
    "small U-Net, 32x32": (64, 32, 32, 32),
    "small U-Net, 32x32, 64": (64, 64, 32, 32),
    "small U-Net, 16x16": (64, 64, 16, 32),
    "small U-Net, 16x16, 128": (64, 128, 16, 32),
    "SD 1.5, 64x64": (2, 320, 64, 32),
    "SD 1.5, 32x32": (2, 640, 32, 32),
    "SD 1.5, 16x16": (2, 1280, 16, 32),
}
LINEAR = {  # rows, in, out
    "small U-Net, qkv": (16384, 64, 192),
    "small U-Net, out": (16384, 64, 64),
    "SD 1.5, 320": (8192, 320, 320),
    "SD 1.5, 640": (2048, 640, 640),
    "SD 1.5, 1280": (512, 1280, 1280),
    "SD 1.5, 320 to 2560": (8192, 320, 2560),
    "SD 1.5, 77 words": (154, 768, 320),
}
CONVOLUTION = {  # samples, in, out, size
    "SD 1.5, 64x64, 320": (2, 320, 320, 64),
    "SD 1.5, 64x64, 640 to 320": (2, 640, 320, 64),
    "SD 1.5, 64x64, 960 to 320": (2, 960, 320, 64),
    "SD 1.5, 64x64, 640": (2, 640, 640, 64),
    "SD 1.5, 32x32, 320 to 640": (2, 320, 640, 32),
    "SD 1.5, 32x32, 640": (2, 640, 640, 32),
    "SD 1.5, 32x32, 960 to 640": (2, 960, 640, 32),
    "SD 1.5, 32x32, 1280 to 640": (2, 1280, 640, 32),
    "SD 1.5, 32x32, 1920 to 640": (2, 1920, 640, 32),
    "SD 1.5, 32x32, 1280": (2, 1280, 1280, 32),
    "SD 1.5, 16x16, 640 to 1280": (2, 640, 1280, 16),
    "SD 1.5, 16x16, 1280": (2, 1280, 1280, 16),
    "SD 1.5, 16x16, 1920 to 1280": (2, 1920, 1280, 16),
    "SD 1.5, 16x16, 2560 to 1280": (2, 2560, 1280, 16),
    "SD 1.5, 8x8, 1280": (2, 1280, 1280, 8),
    "SD 1.5, 8x8, 2560 to 1280": (2, 2560, 1280, 8),
    "decoder, 64x64, 512": (1, 512, 512, 64),
    "decoder, 128x128, 512": (1, 512, 512, 128),
    "decoder, 256x256, 256": (1, 256, 256, 256),
    "decoder, 256x256, 128": (1, 128, 128, 256),
    "tiny decoder, 256x256, 64": (1, 64, 64, 256),
    "small U-Net, 32x32": (64, 32, 32, 32),
    "small U-Net, 16x16": (64, 64, 64, 16),
}
TRAINED = {  # samples, in, out, size
    "small U-Net, 32x32": (64, 32, 32, 32),
    "small U-Net, 32x32, 64 to 32": (64, 64, 32, 32),
    "small U-Net, 32x32, 96 to 32": (64, 96, 32, 32),
    "small U-Net, 32x32, 64": (64, 64, 64, 32),
    "small U-Net, 16x16, 64": (64, 64, 64, 16),
    "small U-Net, 16x16, 128 to 64": (64, 128, 64, 16),
    "small U-Net, 8x8, 64": (64, 64, 64, 8),
}
Function = Callable[..., Tensor]


def medians(works: Sequence[Callable[[], Any]], runs: int) -> list[float]:
    """Return the median CPU time of each, which take turns."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(runs + 1):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            if turn:  # the first finds memory
                taken.append(time.process_time() - began)
    return [statistics.median(taken) for taken in times]


def compared(
    plain: Function,
    fast: Function,
    exact: Function,
    inputs: list[Tensor],
    runs: int,
    flop: float = 0,
    one: bool = False,
) -> dict[str, Any]:
    """Return the times and errors of two functions of the same inputs; with `one`, the errors of one sample."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = [plain(*inputs), fast(*inputs)]
    dy = torch.randn_like(outputs[0])
    with torch.no_grad():
        forward = medians([lambda: plain(*inputs), lambda: fast(*inputs)], runs)
    backward = medians(
        [lambda y=y: torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in outputs], runs
    )  # fmt: skip
    gradients = [torch.autograd.grad(y, inputs, dy) for y in outputs]
    count = 1 if one else len(dy)
    double = [(x[:1] if one else x).detach().double().requires_grad_() for x in inputs]
    y = exact(*double)
    wanted = torch.autograd.grad(y, double, dy[:count].double())
    result: dict[str, Any] = {}
    for index, name in enumerate(("plain", "fast")):
        result[name] = {
            "forward_ms": 1e3 * forward[index],
            "backward_ms": 1e3 * backward[index],
            "error": error(outputs[index][:count], y),
            "gradient_error": max(error(a[: len(b)], b) for a, b in zip(gradients[index], wanted, strict=True)),
        }
        if flop:
            result[name]["forward_gflops"] = flop / forward[index] / 1e9
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, of the largest value."""
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())


def attention(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Measure attention of one shape."""
    samples, heads, queries, keys, dim = shape
    inputs = [torch.randn(samples, n, heads * dim).to(dtype) for n in (queries, keys, keys)]
    flop = 4 * samples * heads * queries * keys * dim
    plain, fast = (lambda q, k, v, f=f: f(q, k, v, heads) for f in (attention_of.plain, attention_of.attention))
    return compared(plain, fast, lambda q, k, v: by_formula(q, k, v, heads), inputs, runs, flop, one=True)


def norm(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Measure group norm with SiLU in channels-last."""
    samples, channels, size, groups = shape
    x = torch.randn(samples, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
    inputs = [x, torch.rand(channels), torch.randn(channels)]

    def function(work: Function, cast: bool) -> Function:
        def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            w, b = (w.to(x.dtype), b.to(x.dtype)) if cast else (w, b)
            return work(x, groups, w, b, 1e-5, "silu")

        return call

    plain, fast = function(norm_of.plain, True), function(norm_of.group_norm, False)
    return compared(plain, fast, plain, inputs, runs)


def linear(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Measure a linear layer: PyTorch's (plain) and as a 1x1 convolution (fast)."""
    rows, inner, outer = shape
    inputs = [torch.randn(1, rows, inner).to(dtype), torch.randn(outer, inner).to(dtype) / inner**0.5]
    return compared(F.linear, convolution, F.linear, inputs, runs, 2 * rows * inner * outer)


def packed_convolution(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Measure a convolution of packed weights, forward: oneDNN's (plain) and Winograd's (fast)."""
    samples, inner, outer, size = shape
    x = torch.randn(samples, inner, size, size).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(outer, inner, 3, 3) / (9 * inner) ** 0.5).to(dtype), torch.randn(outer).to(dtype)
    tile, blocks = winograd.tile(inner, outer, dtype), blocks_of_convolution(weight, (1, 1), (1, 1))
    if not tile:
        raise SystemExit(f"kernels.py: there is no Winograd convolution in {dtype} here (reverie doctor says why)")
    transformed, wide = winograd.transform(weight, tile, dtype), bias.float()
    works = [lambda: convolve(x, blocks, bias, (1, 1), (1, 1)), lambda: winograd.convolve(x, transformed, wide)]
    times = medians(works, runs)
    wanted = F.conv2d(x[:1].double(), weight.double(), bias.double(), padding=1)
    flop = 18 * samples * inner * outer * size**2
    found = {
        name: {
            "forward_ms": 1e3 * seconds,
            "forward_gflops": flop / seconds / 1e9,
            "relative_error": float((work()[:1] - wanted).norm() / wanted.norm()),
        }
        for name, work, seconds in zip(("plain", "fast"), works, times, strict=True)
    }
    return {"tile": tile} | found


def trained_convolution(shape: tuple[int, ...], dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Measure a convolution with its gradients: PyTorch's (plain) and with the weight's gradient by ours (fast)."""
    samples, inner, outer, size = shape
    x = torch.randn(samples, inner, size, size).to(dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(outer, inner, 3, 3) / (9 * inner) ** 0.5).to(dtype).to(memory_format=torch.channels_last)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return trained(x, weight, bias, (1, 1), (1, 1))

    inputs = [x, weight, torch.randn(outer).to(dtype)]
    return compared(plain, fast, plain, inputs, runs, 18 * samples * inner * outer * size**2)


OPERATORS: dict[str, tuple[Callable[..., dict[str, Any]], Any]] = {
    "attention": (attention, ATTENTION),
    "norm": (norm, NORM),
    "linear": (linear, LINEAR),
    "convolution": (packed_convolution, CONVOLUTION),
    "trained": (trained_convolution, TRAINED),
}
HEAD = ["", "forward ms: plain", "fast", "x", "backward ms: plain", "fast", "x"]
HEAD += ["error: plain", "fast", "of gradients: plain", "fast"]
FORWARD = ["", "m", "ms: plain", "fast", "x", "GFLOP/s: plain", "fast", "relative error: plain", "fast"]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the printed table."""
    lines = []
    for name, got in found.items():
        a, b = got["plain"], got["fast"]
        cells = []
        for way in ("forward_ms", "backward_ms"):
            cells += [f"{a[way]:.1f}", f"{b[way]:.1f}", f"{a[way] / b[way]:.2f}"]
        for kind in ("error", "gradient_error"):
            cells += [f"{a[kind]:.0e}", f"{b[kind]:.0e}"]
        lines.append([name, *cells])
    return lines


def forward_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the printed table of what has no backward."""
    lines = []
    for name, got in found.items():
        a, b = got["plain"], got["fast"]
        cells = [str(got["m"]), f"{a['forward_ms']:.1f}", f"{b['forward_ms']:.1f}"]
        cells += [f"{a['forward_ms'] / b['forward_ms']:.2f}"]
        cells += [f"{x['forward_gflops']:.0f}" for x in (a, b)] + [f"{x['relative_error']:.1e}" for x in (a, b)]
        lines.append([name, *cells])
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default=",".join(OPERATORS), help="operators (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--quick", action="store_true", help="leave out shapes with more than 2^28 scores")
    parser.add_argument("--json", type=Path, help="write one object with everything to this file")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in OPERATORS]:
        parser.error(f"--only: there is no operator {unknown[0]!r} (known: {', '.join(OPERATORS)})")
    if options.runs < 1:
        parser.error("--runs must be above 0")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(),
        "versions": {"python": sys.version.split()[0]} | versions(("reverie", "torch")),
        "kernels": dispatch.status(),
        "dtype": options.dtype,
    }
    for operator in options.only:
        measure, shapes = OPERATORS[operator]
        found = {}
        for name, shape in shapes.items():
            if operator == "attention" and options.quick and shape[0] * shape[1] * shape[2] * shape[3] > 2**28 - 1:
                continue
            found[name] = {"shape": shape} | measure(shape, dtype, options.runs)
            print(f"{operator}, {name}", file=sys.stderr, flush=True)
        result[operator] = found
        forward = operator == "convolution"
        text = table(FORWARD, forward_rows(found)) if forward else table(HEAD, rows(found))
        print(f"\n{operator}\n\n{text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
