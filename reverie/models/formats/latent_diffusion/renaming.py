"""A tensor's name and form in one layout, and in another: both ways from one rule.

A rule takes one tensor of the original layout to one of the new names, or to three where queries, keys
and values lie in one matrix. Rules are made from names and shapes alone; numbers are touched only when a
rule is applied, and then mostly as views.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reverie.base.errors import ModelFileError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Form = Literal["same", "matrix", "transposed", "thirds"]


@dataclass(frozen=True)
class Rule:
    """One tensor of the original layout, and what it is called and looks like in the new one.

    Arguments:
        old: Its name there.
        shape: Its shape there.
        new: Its names here: one, or three for "thirds".
        form: "same"; "matrix" for a convolution with 1x1 pixels that is a matrix here; "transposed"; or
            "thirds" for three tensors stacked along the first axis.

    Example:
        >>> rule = Rule("in_proj_bias", (6,), ("q", "k", "v"), "thirds")
        >>> [part.tolist() for part in rule.split(torch.arange(6))]
        [[0, 1], [2, 3], [4, 5]]
        >>> rule.join(rule.split(torch.arange(6))).tolist()
        [0, 1, 2, 3, 4, 5]
    """

    old: str
    shape: Shape
    new: tuple[str, ...]
    form: Form = "same"

    def __post_init__(self) -> None:
        wrong = (
            (self.form == "matrix" and (len(self.shape) < 3 or set(self.shape[2:]) != {1}))
            or (self.form == "transposed" and len(self.shape) != 2)
            or (self.form == "thirds" and (not self.shape or self.shape[0] % 3))
        )
        if wrong:
            raise ModelFileError(f"{self.old} has the shape {self.shape}, which is none that Stable Diffusion has")

    @property
    def shapes(self) -> dict[str, Shape]:
        """The new names with their shapes."""
        shape = self.shape
        if self.form == "matrix":
            shape = shape[:2]
        elif self.form == "transposed":
            shape = shape[::-1]
        elif self.form == "thirds":
            shape = (shape[0] // 3, *shape[1:])
        return dict.fromkeys(self.new, shape)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors under their new names, from the one under its old name."""
        if self.form == "matrix":
            return (tensor.reshape(tensor.shape[:2]),)
        if self.form == "transposed":
            return (tensor.T.contiguous(),)
        return tensor.chunk(3) if self.form == "thirds" else (tensor,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensor under its old name, from those under the new ones."""
        if self.form == "matrix":
            return tensors[0].reshape(self.shape)
        if self.form == "transposed":
            return tensors[0].T.contiguous()
        return torch.cat(list(tensors)) if self.form == "thirds" else tensors[0]


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Return a name with the longest of its beginnings that a table holds replaced; None where it holds none.

    Example:
        >>> renamed("out.0.weight", {"out.0": "conv_norm_out"})
        'conv_norm_out.weight'
    """
    head = name
    while head:
        if head in table:
            return table[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return None


def sized(shapes: Shapes, name: str, axes: int) -> Shape:
    """Return a tensor's shape, having refused one that is missing or has another number of axes.

    Raises:
        ModelFileError: It is so.
    """
    shape = shapes.get(name)
    if shape is None:
        raise ModelFileError(f"{name} is missing: it is another model, or a part of one")
    if len(shape) != axes or 0 in shape:
        raise ModelFileError(f"{name} has the shape {tuple(shape)}, which is none that Stable Diffusion has")
    return tuple(shape)


def convert(rules: Iterable[Rule], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return tensors under their new names.

    Arguments:
        rules: What becomes of each.
        read: Returns the tensor of an old name, as a memory-mapped file does.
    """
    return {name: part for rule in rules for name, part in zip(rule.new, rule.split(read(rule.old)), strict=True)}


def revert(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under their old names.

    Raises:
        ModelFileError: One is missing, is of another shape, or is left over.
    """
    rules = tuple(rules)
    due = {name: shape for rule in rules for name, shape in rule.shapes.items()}
    faults = [f"{name} is missing" for name in due if name not in tensors]
    faults += [f"{name} has no place" for name in tensors if name not in due]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} and must be {shape}"
        for name, shape in due.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if faults:
        raise ModelFileError(f"{len(faults)} tensors do not go into the original layout: {'; '.join(faults[:3])}")
    return {rule.old: rule.join([tensors[name] for name in rule.new]) for rule in rules}
