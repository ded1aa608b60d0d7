"""What a benchmark says of itself: the machine, the versions, a table, a picture."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from reverie.kernels.dispatch import status


def machine() -> dict[str, object]:
    """Return what the figures depend on: processor, cores, memory, system, and what serves the operators.

    Said as well where it is not reverie's own library: figures of PyTorch's operators are not ours.
    """
    served = status()
    if slow := [name for name, by in served.items() if by.startswith("PyTorch")]:
        print(f"{', '.join(slow)}: {served[slow[0]]}", file=sys.stderr)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": served,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gpu_or_not() -> str:
    """Return the device to measure on, "cuda" or "cpu", having said where there is no GPU."""
    if torch.cuda.is_available():
        return "cuda"
    print("no GPU here: what follows is of the CPU", file=sys.stderr)
    return "cpu"


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the version of each package, None for one that is not installed.

    Example:
        >>> versions(["no-such-package"])
        {'no-such-package': None}
    """

    def one(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: one(name) for name in packages}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, numbers to the right.

    Example:
        >>> print(table(["who", "images/s"], [["ours", "112"]]))
        | who  | images/s |
        |:-----|---------:|
        | ours |      112 |
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines = [_line(head, widths), "|" + "|".join(rule) + "|"]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"


def save_grid(images: UInt8[Tensor, "n 1 h w"], path: Path, columns: int = 10, scale: int = 2) -> None:
    """Write grey images as one PNG, row by row, each pixel scale times as large."""
    rows = len(images) // columns
    cells = images[: rows * columns, 0].reshape(rows, columns, *images.shape[2:])
    grid = cells.permute(0, 2, 1, 3).reshape(rows * images.shape[2], columns * images.shape[3]).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(grid, np.ones((scale, scale), np.uint8))).save(path)
