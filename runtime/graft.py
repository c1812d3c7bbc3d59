"""Grafts: all that the runtime knows about an adaptation of a model.

A graft says where (a module path and how it takes hold there), with which typed function, and with which
tensors.  Specs, methods and sites stay above; a graft carries closures that they made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rewrite.codegen.delta import Delta
from rewrite.codegen.maps import LINEAR, LayerMap, Rows

Tensor = torch.Tensor
Where = Literal["output", "weight", "storage", "train"]


@dataclass(frozen=True)
class Slot:
    """One tensor of a graft: shape, dtype, and whether it trains."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True


@dataclass(frozen=True)
class Graft:
    """One adaptation of one module.

    where      `output`: `op(x, y, *tensors, training=)` changes the module's output;
               `weight`: `op(W, *tensors)` reparameterises `tensor`;
               `storage`: `op(*stored)` decodes `tensor`, `encode(W)` made the stored tensors;
               `train`: the base tensors named in `tensors` are trained, nothing is added.
    initialise `W (..., d_out, d_in) -> {slot: value}`, called once; W is the matrix of the weight, `rows` only.
    delta      `tensors -> Delta`, an update of those rows, for merging; a `weight` graft without one is merged by
               its op.
    tensor     the parameter of the module, stored with `shape`; `map` says how the module applies it.
    rows       rows of its matrix that the graft touches, None for all of them.
    sharers    other modules whose `tensor` is the same object: a `weight` graft takes hold there too, once.
    """

    path: str
    name: str
    where: Where
    op: Callable[..., Any] | None = None
    slots: Mapping[str, Slot] = field(default_factory=dict)
    initialise: Callable[[Tensor], dict[str, Tensor]] | None = None
    delta: Callable[..., Delta] | None = None
    encode: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    read: Callable[[Mapping[str, Any], str], tuple[Tensor, ...] | None] | None = None  # a foreign checkpoint
    tensor: str = "weight"
    shape: tuple[int, ...] = ()  # of that tensor, as the module stores it
    map: LayerMap = LINEAR
    rows: Rows | None = None
    sharers: tuple[str, ...] = ()
    label: str = ""  # how explain names it, e.g. "lora(r=8)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Graft:
        return self  # immutable; its closures are shared so that copies of a model share compiled code

    @property
    def places(self) -> tuple[str, ...]:
        """The modules that it takes hold of: its own first."""
        return (self.path, *self.sharers)

    def view(self, weight: Tensor) -> Tensor:
        """The rows (..., d_out, d_in) that this graft touches, of the module's tensor."""
        matrix = self.map.matrix(weight)
        return matrix if self.rows is None else self.rows.take(matrix)
