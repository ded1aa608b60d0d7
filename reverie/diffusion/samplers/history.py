"""The past of a multistep sampler: its last estimates and their lambdas, kept in the state as tensors with a row for
each sample, so that rows of any age share a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.diffusion.levels import Level
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import State, Step


@dataclass(frozen=True)
class History:
    """The last estimates, the latest first.

    Arguments:
        values: Estimates, each (B, *D); zero where there was none yet.
        lam: The lambda of each of them, in the same order: a list with a number for each sample.
    """

    values: list[Tensor]
    lam: list[list[float]]

    @staticmethod
    def empty(x: Data, length: int) -> dict[str, Tensor]:
        """Return the memory of a history of that length before the first step."""
        values = {f"past_{j}": torch.zeros_like(x) for j in range(length)}
        return values | {f"lam_{j}": torch.zeros(len(x), dtype=torch.float64) for j in range(length)}

    @staticmethod
    def of(state: State, length: int) -> "History":
        """Return the history that a state holds."""
        values = [state.memory[f"past_{j}"] for j in range(length)]
        return History(values, [state.memory[f"lam_{j}"].tolist() for j in range(length)])

    def push(self, value: Tensor, here: Sequence[Level]) -> dict[str, Tensor]:
        """Return the memory with one more estimate, the oldest dropped."""
        if not self.values:
            return {}
        values = [value, *self.values[:-1]]
        lam = [[level.lam for level in here], *self.lam[:-1]]
        memory = {f"past_{j}": kept for j, kept in enumerate(values)}
        return memory | {f"lam_{j}": torch.tensor(row, dtype=torch.float64) for j, row in enumerate(lam)}

    def nodes(self, orders: Sequence[int]) -> list[tuple[float, ...]]:
        """Return for each sample the lambdas of the past estimates that a method of its order uses."""
        return [tuple(lam[row] for lam in self.lam[: order - 1]) for row, order in enumerate(orders)]


def orders(order: int, step: Step, fall_below: int | None = None) -> list[int]:
    """Return the order of each sample's step: what its past allows, and less towards the end.

    Arguments:
        order: The method's order.
        step: The step.
        fall_below: Let the order fall to 1 with the last steps, in runs of fewer steps than this; None for never.
    """
    found = []
    for k, left in zip(step.k, step.left, strict=True):
        rises = min(order, k + 1)
        falls = left is not None and fall_below is not None and k + 1 + left < fall_below
        found.append(min(rises, left + 1) if falls and left is not None else rises)
    return found
