"""What a model is made of, as plain data: one `Place` per module that owns tensors.

The resolver reads places alone, so that a live model and an exported program (where the graph is all there is)
resolve alike.  Nothing here says what a place is for: that is `rewrite.sites`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.export import ExportedProgram

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


def take_exported(program: ExportedProgram) -> Inventory:
    """The inventory of an exported program: paths and types from `nn_module_stack`, shapes from its state."""
    types = _types(program)
    owned: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in program.state_dict.items():
        owner, _, leaf = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            owned.setdefault(owner, {})[leaf] = tensor
    users: dict[int, list[str]] = {}
    for path, tensors in owned.items():
        if "weight" in tensors:
            users.setdefault(tensors["weight"].data_ptr(), []).append(path)
    places = []
    for path, tensors in owned.items():
        first = tensors.get("weight", next(iter(tensors.values())))
        kind, transposed = _kind_of(types.get(path), first if "weight" in tensors else None)
        shape = tuple(reversed(first.shape)) if transposed else tuple(first.shape)
        tied = tuple(p for p in users.get(first.data_ptr(), ()) if p != path)
        named = tuple((n, tuple(t.shape)) for n, t in tensors.items())
        name = getattr(types.get(path), "__name__", "")
        places.append(Place(path, name, kind, shape, first.dtype, named, transposed, tied, path in types))
    lists: dict[str, list[str]] = {}
    for path, cls in types.items():
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit():
            inner = any(p.startswith(f"{path}.") for p in types)
            lists.setdefault(parent, []).append(cls.__name__ if cls and inner else "")
    root = getattr(types.get(""), "__name__", "") or "exported program"
    return Inventory(root, tuple(places), block_lists(lists), frozenset(lists), None)


def _types(program: ExportedProgram) -> dict[str, type | None]:
    """The class of every module that a program called, by path; None where it cannot be imported here."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, name in (node.meta.get("nn_module_stack") or {}).values():
            found[path.partition("@")[0]] = name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}"
    return {path: _imported(name) for path, name in found.items()}


def _imported(qualified: str) -> type | None:
    module, _, name = qualified.rpartition(".")
    return getattr(sys.modules.get(module), name, None) or type(name, (), {})


def _place(path: str, module: nn.Module, tensors, tied: tuple[str, ...], called: bool) -> Place:
    weight = module._parameters.get("weight")
    first = next(module.parameters(recurse=False)) if weight is None else weight
    kind, transposed = _kind_of(type(module), weight)
    shape = tuple(first.shape)
    if transposed:
        shape = (shape[1], shape[0], *shape[2:])
    return Place(path, type(module).__name__, kind, shape, first.dtype, tensors, transposed, tied, called)


def _kind_of(cls: type | None, weight: torch.Tensor | None) -> tuple[Kind, bool]:
    """(kind, transposed) by type, or by the shapes that define a kind: never by a list of architectures."""
    if cls is None or weight is None:
        return "other", False
    if issubclass(cls, nn.Linear):
        return "linear", False
    if issubclass(cls, nn.Embedding):
        return "embedding", False
    if issubclass(cls, nn.modules.conv._ConvNd):
        return "conv", False
    if weight.ndim == 2 and cls.__name__ == "Conv1D":  # transformers' linear layer with a (d_in, d_out) weight
        return "linear", True
    if weight.ndim == 1 and "norm" in cls.__name__.lower():
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
    """Element types of every list of modules, by path; '' for an element that holds no modules itself."""
    return {
        path: [type(m).__name__ if any(m.children()) else "" for m in module]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and path
    }


def block_lists(lists: dict[str, list[str]]) -> tuple[str, ...]:
    """The outermost lists of composed modules, most of one type: a list of single layers is no list of blocks."""
    found = [p for p, types in lists.items() if types and all(types) and _alike(types)]
    return tuple(p for p in found if not any(p.startswith(f"{q}.") for q in found))


def _alike(types: Iterable[str]) -> bool:
    count = Counter(types)
    return max(count.values()) * 2 > sum(count.values())


def _head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((p for p, m in model.named_modules() if m is head), None) if head is not None else None
