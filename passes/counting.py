"""Counting on partitioned graphs: bytes saved for backward, by storage, and floating-point operations.

Works on fake values alone, at any size, without a device.  Symbolic sizes count at their hints.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_symbolic
from torch.utils.flop_counter import flop_registry

from rewrite.codegen.costs import flops_of_results

# What stands below an adapted module in a model is part of that module's computation.
_GRAFTED = re.compile(r"\.(?:adapters|parametrizations)(?:\.|$).*")


@dataclass(frozen=True)
class Saved:
    """One storage kept from the forward for the backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    site: str


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares the storage of its first argument."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def base(node: fx.Node) -> fx.Node:
    """The node that allocated the storage behind a chain of views."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def saved_for_backward(forward: fx.GraphModule, outputs: int) -> list[Saved]:
    """What a partitioned forward keeps for its backward beyond its first `outputs` results.

    Parameters and inputs are not counted: they live anyway.  Storages that are results are not either.
    """
    results = next(n for n in reversed(forward.graph.nodes) if n.op == "output").args[0]
    given = {base(n) for n in results[:outputs] if isinstance(n, fx.Node)}
    kept: dict[fx.Node, Saved] = {}
    for node in results[outputs:]:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        owner = base(node)
        if owner.op == "placeholder" or owner in given or owner in kept:
            continue
        value = owner.meta.get("val")
        value = value if isinstance(value, torch.Tensor) else node.meta["val"]
        shape = tuple(hint(s) for s in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
        kept[owner] = Saved(owner.name, shape, dtype, _bytes(value), module_path(owner))
    return list(kept.values())


def bytes_of(node: fx.Node) -> int:
    """Bytes of the tensor that a node returns; 0 for a node that returns none, or several."""
    value = node.meta.get("val")
    return _bytes(value) if isinstance(value, torch.Tensor) else 0


def _bytes(value: torch.Tensor) -> int:
    return torch.Size([hint(s) for s in value.shape]).numel() * value.dtype.itemsize


def module_path(node: fx.Node) -> str:
    """Path of the module that a node of a joint or partitioned graph came from, '' where unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return _GRAFTED.sub("", paths[-1].partition("].")[2]) if paths else ""


def hint(size: Any) -> int:
    """A size as a number: symbolic sizes at the value they were traced with."""
    if isinstance(size, torch.SymInt) and is_symbolic(size):
        return int(size.node.hint) if size.node.hint is not None else 1
    return int(size)


def flops(graph: fx.Graph) -> int:
    """Floating-point operations of the products in a graph (2 per multiply-add), by PyTorch's own formulas."""
    return sum(map(node_flops, graph.nodes))


def node_flops(node: fx.Node) -> int:
    """Floating-point operations of one node, 0 where it is no product."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", node.target))
    if node.op != "call_function" or formula is None:
        return 0
    args, kwargs = _sized_arguments(node)
    return int(formula(*args, **kwargs, out_val=sized(node.meta.get("val"))))


def result_flops(node: fx.Node) -> int:
    """Those of one node, where each result of an operator with several is a node: what takes it from them."""
    if flops_of_results(node.target) is not None:
        return 0
    source = node.args[0] if node.target is operator.getitem else None
    formula = flops_of_results(source.target) if isinstance(source, fx.Node) else None
    if formula is None or not isinstance(source, fx.Node) or not isinstance(index := node.args[1], int):
        return node_flops(node)
    args, kwargs = _sized_arguments(source)
    return formula(*args, **kwargs)[index]


def _sized_arguments(node: fx.Node) -> Any:
    return fx.map_arg((node.args, node.kwargs), lambda n: sized(n.meta.get("val")))


def sized(value: Any) -> Any:
    """A value for a formula that reads shapes and dtypes alone: a tensor of hinted sizes on the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, torch.SymInt) else value
