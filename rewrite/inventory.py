"""What a model is made of, as plain data: one `Place` per module that owns tensors.

The resolver reads places alone, so that a live model and an exported program (where the graph is all there is)
resolve alike.  Nothing here says what a place is for: that is `rewrite.sites`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from rewrite import structure
from rewrite.codegen.maps import LINEAR, LayerMap, Matmul
from rewrite.entry import Entry, entry_of
from rewrite.layers import is_conv1d, layer_of, layer_of_reader
from rewrite.paths import joined
from rewrite.structure.inputs import Inputs
from rewrite.structure.program import of_program
from rewrite.structure.roles import Structure, Use

Kind = Literal["linear", "conv", "embedding", "norm", "expert", "tokens", "block", "other"]


@dataclass(frozen=True)
class Place:
    """A module with tensors of its own, or one of its tensors where that is a stack of weights (`expert`).

    `shape` is that of its weight seen as (d_out, d_in, ...).  `tensor` names its weight and `map` says how the module
    applies it.  `tied` names the places that share its weight.
    """

    path: str
    type: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    tied: tuple[str, ...] = ()
    called: bool = True  # a parent may read its weight without calling it (nn.MultiheadAttention)
    tensor: str = "weight"
    map: LayerMap = LINEAR

    @property
    def parameter(self) -> str:
        """The name of its weight in the model."""
        return joined(self.path, self.tensor)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of its weight as the module holds it."""
        return dict(self.tensors).get(self.tensor, self.shape)

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as (d_in, d_out)."""
        return self.map == Matmul(True)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape (..., d_out, d_in) of its weight seen as a matrix; (d,) for a vector."""
        return self.map.matrix_shape(self.stored)


@dataclass(frozen=True)
class Inventory:
    """The places of a model, the lists of repeated blocks that its layer numbers count, and what a trace of it says."""

    model: str
    places: tuple[Place, ...]
    blocks: tuple[str, ...]  # paths of the lists whose elements are blocks, e.g. `model.layers`
    lists: frozenset[str]  # paths of all lists of modules
    head: str | None  # path of the output projection, where the model says which it is
    structure: Structure | None = None
    entry: Entry | None = None  # where tokens enter it
    untraced: str = ""  # why there is no structure


def take(model: nn.Module, batch: Inputs | None = None) -> Inventory:
    """The inventory of a live model; shared modules appear once, under their first name.

    `batch` is what to trace it with, where the one that its signature suggests does not do.
    """
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
            places += _experts(places[-1], module)
    lists = _lists(model)
    found = Inventory(
        type(model).__name__, tuple(places), block_lists(lists), frozenset(lists), _head(model), entry=entry_of(model)
    )
    try:
        seen = structure.of(model, batch, found.blocks) if places else None
    except structure.TraceError as error:
        return dataclasses.replace(found, untraced=str(error))
    if seen is None:
        return found
    blocks = innermost(lists, seen.residual) or found.blocks
    return dataclasses.replace(found, places=refined(found.places, seen), blocks=blocks, structure=seen)


def refined(places: Sequence[Place], seen: Structure) -> tuple[Place, ...]:
    """Places as a trace saw them used: which weights their module applies itself, and weights under other names."""
    found: list[Place] = []
    for place in places:
        uses = {n: u for n, _ in place.tensors if (u := seen.uses.get(joined(place.path, n))) is not None}
        own = uses.get(place.tensor)
        if own is not None and (place.kind in ("linear", "conv", "embedding")):
            found.append(_as_used(place, own))
        elif place.kind == "expert":  # seen as a tensor of its module
            continue
        elif uses:
            rest = tuple((n, shape) for n, shape in place.tensors if n not in uses)
            found += [dataclasses.replace(place, tensors=rest)] if rest else []
            found += [_read(place, n, use) for n, use in uses.items()]
        elif place.parameter in seen.outside:  # in a way that is not understood
            found.append(dataclasses.replace(place, called=False))
        else:
            found.append(place)
    return tuple(found)


def _as_used(place: Place, use: Use) -> Place:
    layer = _product(use) if place.kind == "linear" else place.map
    return dataclasses.replace(place, called=place.called and use.called, map=layer)


def _read(place: Place, tensor: str, use: Use) -> Place:
    """The place of one weight among the tensors of a module."""
    shape = dict(place.tensors)[tensor]
    kind: Kind = use.kind if use.kind in ("expert", "linear") else "other"
    layer = LINEAR if kind == "other" else _product(use)
    return dataclasses.replace(
        place, kind=kind, tensors=((tensor, shape),), shape=layer.matrix_shape(shape), tensor=tensor, map=layer,
        called=use.called, tied=place.tied if tensor == place.tensor else (),
    )  # fmt: skip


def _product(use: Use) -> Matmul:
    """How a weight was seen multiplied: output channels last, where they come behind those that are summed over."""
    return Matmul(use.output > (use.input or 0))


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
    places, maps = [], _exported_maps(program)
    for path, tensors in owned.items():
        first = tensors.get("weight", next(iter(tensors.values())))
        kind = _kind_of(types.get(path), first if "weight" in tensors else None)
        linear = Matmul(True) if kind == "linear" and is_conv1d(types.get(path) or object) else LINEAR
        layer, alone = maps.get(path, (linear, kind not in ("conv", "embedding")))
        shape = layer.matrix_shape(first.shape) if layer == Matmul(True) else tuple(first.shape)
        tied = tuple(p for p in users.get(first.data_ptr(), ()) if p != path)
        named = tuple((n, tuple(t.shape)) for n, t in tensors.items())
        name = getattr(types.get(path), "__name__", "")
        places.append(Place(path, name, kind, shape, first.dtype, named, tied, path in types and alone, map=layer))
    lists: dict[str, list[str]] = {}
    for path, cls in types.items():
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit():
            inner = any(p.startswith(f"{path}.") for p in types)
            lists.setdefault(parent, []).append(cls.__name__ if cls and inner else "")
    root = getattr(types.get(""), "__name__", "") or "exported program"
    blocks = block_lists(lists)
    seen = structure.derive(of_program(program), blocks)
    blocks = innermost(lists, seen.residual) or blocks
    return Inventory(root, refined(places, seen), blocks, frozenset(lists), None, seen)


def _exported_maps(program: ExportedProgram) -> dict[str, tuple[LayerMap, bool]]:
    """(map, whether the layer computes nothing else) of every convolution and embedding that a program calls."""
    found: dict[str, tuple[LayerMap, bool]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (layer := layer_of_reader(node)) is not None:
            stack = node.meta.get("nn_module_stack") or {}
            path = next(reversed([p for p, _ in stack.values()]), "").partition("@")[0]
            before = node.all_input_nodes[0].meta  # a padding mode is a node of the same module
            found[path] = layer, before.get("nn_module_stack") != stack
    return found


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
    kind = _kind_of(type(module), weight)
    layer = layer_of(module) if kind in ("linear", "conv", "embedding") else LINEAR
    shape = layer.matrix_shape(first.shape) if layer == Matmul(True) else tuple(first.shape)
    return Place(path, type(module).__name__, kind, shape, first.dtype, tensors, tied, called, map=layer)


def _experts(place: Place, module: nn.Module) -> list[Place]:
    """A place for every stack of matrices in a module of no known kind; nothing calls those."""
    stacks = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1]
    return [
        dataclasses.replace(
            place, kind="expert", shape=tuple(p.shape), dtype=p.dtype, tensors=((name, tuple(p.shape)),), tied=(),
            called=False, tensor=name,
        )
        for name, p in stacks
        if place.kind == "other"
    ]  # fmt: skip


def _kind_of(cls: type | None, weight: torch.Tensor | None) -> Kind:
    """The kind by type, or by the shapes that define it: never by a list of architectures."""
    if cls is None or weight is None:
        return "other"
    if issubclass(cls, nn.Linear):
        return "linear"
    if issubclass(cls, nn.Embedding):
        return "embedding"
    if issubclass(cls, nn.modules.conv._ConvNd):
        return "conv"
    if weight.ndim == 2 and is_conv1d(cls):
        return "linear"
    if weight.ndim == 1 and "norm" in cls.__name__.lower():
        return "norm"
    return "other"


def _uncalled(model: nn.Module) -> set[str]:
    """Paths of modules whose weight their parent reads without calling them."""
    return {
        joined(path, "out_proj") for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
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


def innermost(lists: dict[str, list[str]], residual: Collection[str]) -> tuple[str, ...]:
    """Lists of composed modules around residual adds that hold no such list themselves: the blocks of a model.

    So the stages of a hierarchical model are no blocks, their layers are; and experts are none either.
    """
    stacks = [
        p
        for p, types in lists.items()
        if types and all(types) and any(f"{p}.{i}" in residual for i in range(len(types)))
    ]
    alike = [p for p in stacks if _alike(lists[p])]
    return tuple(p for p in alike if not any(q.startswith(f"{p}.") for q in alike))


def _alike(types: Iterable[str]) -> bool:
    count = Counter(types)
    return max(count.values()) * 2 > sum(count.values())


def _head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((p for p, m in model.named_modules() if m is head), None) if head is not None else None
