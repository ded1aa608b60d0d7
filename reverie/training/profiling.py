"""Where the time of a training step goes: a table of operators, forward and backward, from PyTorch's profiler.

The profiler itself takes a few percent, all of them from what calls many operators; what no operator accounts for
(Python, the data) stands in the last row.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3  # steps before the first that counts: they find memory and build kernels

# What an operator's name begins with, or holds, decides which row it is counted in: the first that fits.
ROWS = {
    "optimiser": ("adamw", "foreach", "linalg_vector_norm"),
    "convolution": ("convol",),
    "attention": ("attend", "attention", "softmax", "bmm"),
    "group norm": ("normalise", "group_norm"),
    "activations": ("silu", "gelu", "mish", "relu"),
    "linear": ("mm", "linear"),
    "sums, copies": ("add", "mul", "cat", "copy", "sum", "fill", "div", "sub"),
}


def row_of(name: str) -> str:
    """Return the row that an operator is counted in.

    Example:
        >>> row_of("aten::convolution_backward"), row_of("NormaliseBackward"), row_of("aten::gather")
        ('convolution', 'group norm', 'other operators')
    """
    short = name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::").lower()
    return next((row for row, words in ROWS.items() if any(word in short for word in words)), "other operators")


def is_backward(name: str) -> bool:
    """Whether an operator belongs to the backward pass by its name."""
    return "backward" in name.lower() or name.startswith("autograd::engine")


class Profile:
    """Times the operators of some steps of a run, and says where their time went.

    Arguments:
        steps: How many steps; None for none.
        say: What the table is given to, line by line.
    """

    def __init__(self, steps: int | None, say: Callable[[str], None]) -> None:
        self.steps, self.say = steps or 0, say
        self.seen = 0
        self.seconds = 0.0
        self.profiler: Any = None

    def __call__(self, step: Callable[[], Any]) -> Any:
        """Make a step, and time it if its turn has come."""
        self.seen += 1
        if not self.steps or not WARM_UP < self.seen <= WARM_UP + self.steps:
            return step()
        if self.profiler is None:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            self.profiler.start()
        began = time.perf_counter()
        try:
            return step()
        finally:
            self.seconds += time.perf_counter() - began
            if self.seen == WARM_UP + self.steps:
                self.profiler.stop()
                for line in table(self.profiler.key_averages(), self.seconds, self.steps):
                    self.say(line)


def table(events: Iterable[Any], seconds: float, steps: int) -> list[str]:
    """Return the lines of the table: milliseconds a step, and shares of it."""
    times: dict[str, list[float]] = {}
    for event in events:
        spent = max(event.self_cpu_time_total, getattr(event, "self_device_time_total", 0)) / 1000 / steps
        times.setdefault(row_of(event.key), [0.0, 0.0])[is_backward(event.key)] += spent
    whole = 1000 * seconds / steps
    rest = max(0.0, whole - sum(map(sum, times.values())))
    lines = [
        f"a step takes {whole:.1f} ms (mean of {steps})",
        f"  {'':<16} {'forward':>9} {'backward':>9} {'share':>6}",
    ]
    for name, (forward, backward) in sorted(times.items(), key=lambda item: -sum(item[1])):
        lines.append(f"  {name:<16} {forward:>6.1f} ms {backward:>6.1f} ms {(forward + backward) / whole:>6.1%}")
    return [*lines, f"  {'Python, data':<16} {rest:>6.1f} ms {'':>9} {rest / whole:>6.1%}"]
