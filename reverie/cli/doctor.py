"""`reverie doctor`: what this machine is, has and does, and whether exact sampling holds on it."""

import sys
from typing import Any

import click

import reverie
from reverie.cli import machine
from reverie.cli.console import emit, note, result, size
from reverie.cli.options import Command, Option

ESSENTIAL = ("from run to run", "in any place, among any others")


@click.command(
    cls=Command,
    params=[Option(["--json"], is_flag=True, help="Print one JSON object.", group="output")],
    lower="what else runs on this machine",
)
def command(json: bool) -> None:
    """Say what this machine offers, and measure it: a few seconds.

    The CPU and its instructions, memory, disk, GPUs and optional extras; the speed of float32 and bfloat16,
    and which to choose; and whether a sample's bits are its own here, whatever its batch.
    """
    note("measuring: a few seconds")
    found = examine()
    emit(found) if json else result(written(found))


def examine() -> dict[str, Any]:
    """Return what there is to say, as plain data."""
    import torch  # it takes two seconds: not for --help

    from reverie.cli import measure
    from reverie.kernels import dispatch, gpu

    return {
        "reverie": reverie.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": machine.compiler(),
        "hardware": machine.hardware(),
        "gpus": gpus(),
        "extras": machine.extras(),
        "kernels": dispatch.status(),
        "gpu_kernels": gpu.status() if torch.cuda.is_available() else None,
        "speed": measure.speeds(),
        "fast": measure.fast(),
        "promise": [claim._asdict() for claim in measure.promise()],
    }


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs that torch sees."""
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found: list[dict[str, Any]] = [{"name": card.name, "memory": card.total_memory} for card in cards]
    return found + ([{"name": "Apple GPU (mps)", "memory": None}] if torch.backends.mps.is_available() else [])


def written(found: dict[str, Any]) -> str:
    """Return the findings as text."""
    head = [f"reverie {found['reverie']}, Python {found['python']}, torch {found['torch']}"]
    kernels = kernel_lines(found["kernels"])
    if found["gpu_kernels"]:
        kernels += ["operators on a GPU", row("norms, gated units", found["gpu_kernels"])]
    speed, promise = [*speed_lines(found["speed"]), fast_line(found["fast"])], promise_lines(found)
    parts = (machine_lines(found), extra_lines(found["extras"]), kernels, speed, promise)
    return "\n".join(line for part in (head, *parts) for line in part)


def machine_lines(found: dict[str, Any]) -> list[str]:
    """Return what the machine is, a line each."""
    hardware = found["hardware"]
    cards = [card["name"] + (f", {size(card['memory'])}" if card["memory"] else "") for card in found["gpus"]]
    threads = found["threads"]
    return [
        "machine",
        row("CPU", hardware["cpu"]),
        row("cores", f"{hardware['cores']}, torch uses {threads} thread{'s' * (threads != 1)}"),
        row("instructions", ", ".join(hardware["instructions"]) or "none of those that matter here"),
        row("memory", f"{size(hardware['memory_free'])} free of {size(hardware['memory'])}"),
        row("disk here", f"{size(hardware['disk_free'])} free"),
        row("GPU", "; ".join(cards) or "none that torch sees"),
        row("C++ compiler", found["compiler"] or "none: --compile needs g++ or clang++"),
    ]


def extra_lines(extras: dict[str, Any]) -> list[str]:
    """Return the optional extras, a line each, with what installs one that is missing."""
    lines = ["optional extras"]
    for name, extra in extras.items():
        missing = ", ".join(extra["missing"])
        lines.append(row(name, f"no {missing}: {extra['install']}  ({extra['for']})" if missing else "installed"))
    return lines


def kernel_lines(kernels: dict[str, str]) -> list[str]:
    """Return what serves each operator on the CPU, a line each."""
    return ["operators on the CPU", *(row(name, serves) for name, serves in kernels.items())]


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """Return the speeds by dtype, a line each, and which dtype to choose."""
    units = {"convolution": "GFLOP/s", "matrix_product": "GFLOP/s", "training": "images/s, small U-Net, 32x32"}
    lines = ["speed", row("", f"{'float32':>9} {'bfloat16':>9}")]
    for name, unit in units.items():
        both = speed[name]
        lines.append(row(name.replace("_", " "), f"{both['float32']:>9} {both['bfloat16']:>9}  {unit}"))
    gain = f"bfloat16 trains {speed['bfloat16_gain']} times as fast"
    return [*lines, row("recommended", f"--dtype {speed['recommended']} ({gain})")]


def fast_line(fast: dict[str, Any]) -> str:
    """Return what `--speed fast` does here."""
    held = "weights laid out once" if fast["packed"] else "plain weights: no oneDNN here"
    gain = f"{fast['gain']} times as fast, {100 * fast['error']:.2g} % off (a step of a small U-Net, 32x32)"
    return row("--speed fast", f"{fast['dtype']}, {held}: {gain}")


def promise_lines(found: dict[str, Any]) -> list[str]:
    """Return what exact sampling rests on and whether it holds, a line each, and what follows."""
    words = {True: "yes", False: "no", None: "-"}  # None: with one thread there is nothing to compare
    held: dict[str, list[str]] = {}
    for claim in found["promise"]:
        held.setdefault(claim["claim"], []).append(words[claim["holds"]])
    lines = ["a sample's network output has the same bits", f"  {'':<33} {'float32':>9} {'bfloat16':>9}"]
    lines += [f"  {name:<33} {' '.join(f'{word:>9}' for word in answers)}" for name, answers in held.items()]
    return [*lines, f"  {verdict(found['promise'])}"]


def verdict(promise: list[dict[str, Any]]) -> str:
    """Return what the claims amount to, in a sentence."""
    if all(claim["holds"] for claim in promise if claim["claim"] in ESSENTIAL):
        return "so exact sampling, which fixes the batch's size, gives the same picture alone and in any company"
    return "so exact sampling does NOT hold on this machine: pictures agree to one level of 255 at best"


def row(name: str, value: Any) -> str:
    """Return a line of the report."""
    return f"  {name:<15} {value}"
