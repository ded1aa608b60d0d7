"""A network on a GPU whose hundreds of kernels are started as one: CUDA's graphs.

A U-Net's step of a few pictures is over on a GPU before Python has named its operators. A graph is a record of the
kernels of one call, for one set of shapes: played again, it reads the same memory and writes the same memory, so that
what a call is given is copied in and its answer copied out. The numbers are those of the call that was recorded.

References:
    Accelerating PyTorch with CUDA Graphs
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST = 8  # graphs that are kept, one for each set of shapes; those that were longest unused go
WARM = 2  # calls before one is recorded: libraries choose their kernels in the first


class Recorded(NamedTuple):
    """A call of a network.

    Arguments:
        graph: Its kernels.
        given: What it reads, by name.
        answer: What it writes.
    """

    graph: torch.cuda.CUDAGraph
    given: dict[str, Tensor]
    answer: Tensor


class Replayed(nn.Module):
    """A network on a GPU, each set of shapes recorded as it is first asked for, and played after that.

    It can be neither trained nor moved, and hooks on its modules are called as it is recorded alone.

    Arguments:
        network: Its answer is a function of what it is given alone, and it never waits for the GPU.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.recorded: OrderedDict[tuple[object, ...], Recorded] = OrderedDict()
        self.lock = Lock()  # of the memory that all calls share
        self.pool: Any = None

    def forward(self, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        """Return the network's answer; where its slope is asked for, by a call of its own."""
        given = {"x": x, "time": time, **told}
        if torch.is_grad_enabled() and any(value.requires_grad for value in given.values()):
            return self.network(**given)
        with torch.no_grad():
            return self.played(given)

    def played(self, given: dict[str, Tensor]) -> Tensor:
        """Return the answer of a recorded call."""
        key = tuple((name, value.shape, value.stride(), value.dtype) for name, value in given.items())
        with self.lock:
            if key not in self.recorded:
                if len(self.recorded) >= MOST:
                    self.recorded.popitem(last=False)
                self.recorded[key] = self.record(given)
            self.recorded.move_to_end(key)
            found = self.recorded[key]
            for name, value in given.items():
                found.given[name].copy_(value)
            found.graph.replay()
            return found.answer.clone()

    def record(self, given: dict[str, Tensor]) -> Recorded:
        """Return a call with tensors of these shapes, recorded."""
        held = {name: value.detach().clone() for name, value in given.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.network(**held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            answer = self.network(**held)
        self.pool = graph.pool()  # graphs are never played at once: the next may use the same memory
        return Recorded(graph, held, answer)
