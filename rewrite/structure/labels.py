"""Which entries of a parameter stand where in the operand of a product, after views, splits and transposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewrite.structure.operators import CAST, name_of

LARGEST = 1 << 26
"""Entries above which a reordered copy of labels is not made."""


@dataclass(frozen=True)
class Labels:
    """Of the weight operand of a product: `rows[i]` is the index along dimension `output` of the parameter that
    output channel i is made of (None: i itself); `input` is the parameter's dimension that is summed over."""

    rows: tuple[int, ...] | None
    output: int
    input: int | None


def weight_labels(parameter: fx.Node, operand: fx.Node, contracted: int, output: int) -> Labels | None:
    """The labels of an operand that is made of a parameter by views alone; None where that cannot be told."""
    path = [operand]
    while path[-1] is not parameter:
        first = path[-1].args[0]
        if not isinstance(first, fx.Node):
            return None
        path.append(first)
    shape = parameter.meta["val"].shape
    grids = [_grid(shape, axis) for axis in range(len(shape))]
    try:
        seen = [_follow(grid, path[-2::-1]) for grid in grids]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    sums = [axis for axis, labels in enumerate(seen) if _varies(labels, contracted)]
    outs = [axis for axis, labels in enumerate(seen) if _varies(labels, output)]
    if len(sums) > 1 or len(outs) > 1:
        return None
    # Nothing varies along a dimension of size 1: it is the last one that is left.
    free = [axis for axis in range(len(shape)) if axis not in (*sums, *outs)]
    sums = sums or [free.pop()]
    outs = outs or [free.pop()]
    rows = _along(seen[outs[0]], output)
    whole = rows == tuple(range(shape[outs[0]]))
    return Labels(None if whole else rows, outs[0], sums[0])


def _grid(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=torch.int32).view(sizes).expand(shape)


def _follow(labels: Any, path: list[fx.Node]) -> torch.Tensor:
    for node in path:
        if name_of(node) in CAST:
            continue
        args: Any = fx.map_arg(node.args[1:], _zeros)
        kwargs = {k: v for k, v in fx.map_arg(node.kwargs, _zeros).items() if k not in ("device", "dtype")}
        if name_of(node) in ("view", "_unsafe_view", "_reshape_alias", "reshape"):
            if labels.numel() > LARGEST:
                raise ValueError("too large")
            labels = labels.reshape(args[0])
        elif name_of(node) == "getitem":
            labels = labels[args[0]]
        else:
            labels = node.target(labels, *args, **kwargs)  # type: ignore[operator]
    return labels


def _zeros(node: fx.Node) -> Any:
    """An index: a constant, or where it depends on the batch the first entry for all."""
    val = node.meta["val"]
    return val.constant if val.constant is not None else torch.zeros(val.shape, dtype=val.dtype)


def _varies(labels: torch.Tensor, dim: int) -> bool:
    return len(set(_along(labels, dim))) > 1


def _along(labels: torch.Tensor, dim: int) -> tuple[int, ...]:
    line = labels.movedim(dim, 0)
    while line.ndim > 1:
        line = line.select(1, 0)
    return tuple(line.tolist())
