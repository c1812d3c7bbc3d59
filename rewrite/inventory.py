"""What a model is made of, as plain data: one `Place` per module that owns tensors.

The resolver reads places alone, so that a live model and an exported program (where the graph is all there is)
resolve alike.  Nothing here says what a place is for: that is `rewrite.sites`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Kind = Literal["linear", "conv", "embedding", "norm", "other"]


@dataclass(frozen=True)
class Place:
    """A module with tensors of its own.

    `shape` is that of its weight seen as (d_out, d_in, ...); `transposed` where the module stores it the other
    way round.  `tied` names the places that share its weight.
    """

    path: str
    type: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False
    tied: tuple[str, ...] = ()
    called: bool = True  # a parent may read its weight without calling it (nn.MultiheadAttention)


@dataclass(frozen=True)
class Inventory:
    """The places of a model, and the lists of repeated blocks that its layer numbers count."""

    model: str
    places: tuple[Place, ...]
    blocks: tuple[str, ...]  # paths of the lists whose elements are blocks, e.g. `model.layers`
    lists: frozenset[str]  # paths of all lists of modules
    head: str | None  # path of the output projection, where the model says which it is


def take(model: nn.Module) -> Inventory:
    """The inventory of a live model; shared modules appear once, under their first name."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(weight), []).append(path)
    places, uncalled = [], _uncalled(model)
    for path, module in model.named_modules():
        tensors = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        if tensors:
            weight = module._parameters.get("weight")
            tied = tuple(p for p in users.get(id(weight), ()) if p != path) if weight is not None else ()
            places.append(_place(path, module, tensors, tied, path not in uncalled))
    lists = _lists(model)
    return Inventory(type(model).__name__, tuple(places), block_lists(lists), frozenset(lists), _head(model))


def _place(path: str, module: nn.Module, tensors, tied: tuple[str, ...], called: bool) -> Place:
    weight = module._parameters.get("weight")
    first = next(module.parameters(recurse=False)) if weight is None else weight
    kind, transposed = _kind(module)
    shape = tuple(first.shape)
    if transposed:
        shape = (shape[1], shape[0], *shape[2:])
    return Place(path, type(module).__name__, kind, shape, first.dtype, tensors, transposed, tied, called)


def _kind(module: nn.Module) -> tuple[Kind, bool]:
    """(kind, transposed) by type, or by the shapes that define a kind: never by a list of architectures."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        return "linear", False
    if isinstance(module, nn.Embedding):
        return "embedding", False
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv", False
    if (
        weight is not None
        and weight.ndim == 2
        and type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
    ):
        return "linear", True
    if weight is not None and weight.ndim == 1 and "norm" in type(module).__name__.lower():
        return "norm", False
    return "other", False


def _uncalled(model: nn.Module) -> set[str]:
    """Paths of modules whose weight their parent reads without calling them."""
    return {
        f"{path}.out_proj" if path else "out_proj"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _lists(model: nn.Module) -> dict[str, list[str]]:
    """Element types of every list of modules, by path."""
    return {
        path: [type(m).__name__ for m in module]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and path
    }


def block_lists(lists: dict[str, list[str]]) -> tuple[str, ...]:
    """The outermost lists whose elements are mostly of one type, none of which is a plain layer of torch."""
    plain = set(vars(nn)) | {"Conv1D"}
    found = [p for p, types in lists.items() if types and not plain & set(types) and _alike(types)]
    return tuple(p for p in found if not any(p.startswith(f"{q}.") for q in found))


def _alike(types: Iterable[str]) -> bool:
    count = Counter(types)
    return max(count.values()) * 2 > sum(count.values())


def _head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((p for p, m in model.named_modules() if m is head), None) if head is not None else None
