"""From Dynamo's graph to ours: a copy with readable names, and the site of every node.

Dynamo's own graph is never touched: extra nodes in it break its bookkeeping.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator

import torch
from torch import fx

from rewrite.codegen.typed import typed_op
from rewrite.runtime.adapter import ADAPTERS

_STEP = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")
_TABLES = {"_modules", "_parameters", "_buffers"}
_GRAFTED = re.compile(rf"(?:^|\.)(?:{ADAPTERS}|parametrizations)(?:\.|$).*")


def has_adapters(gm: fx.GraphModule) -> bool:
    """Whether a captured graph holds anything of ours."""
    return any(
        node.op == "call_function" and typed_op(node.target) is not None
        for part in gm.modules()  # a checkpointed region is a graph inside the graph
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph: same inputs in the same order, sources carried over, `meta["site"]` set."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
        new.meta["site"] = site_of(old)
    new_gm = fx.GraphModule(gm, graph)
    new_gm.meta = dict(gm.meta)
    # By this attribute AOTAutograd knows a graph of Dynamo's, and without it which inputs are parameters.
    if hasattr(gm, "_param_name_to_source"):
        new_gm._param_name_to_source = gm._param_name_to_source  # type: ignore[attr-defined]
    for name, inner in gm.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(new_gm, name, copy_graph(inner))
    _rename(graph)
    return new_gm


def site_of(node: fx.Node) -> str:
    """Path of the module that a node belongs to (`model.layers.0.self_attn.q_proj`), '' where unknown."""
    if node.op == "placeholder":
        return path_of(node).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    return _GRAFTED.sub("", _path(str(list(stack.values())[-1][0])))


def path_of(node: fx.Node) -> str:
    """Path of the parameter or input behind a placeholder."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name() if callable(source.name) else source.name
    return _path(str(name))


def _path(source: str) -> str:
    """`L['self']._modules['model'].layers[0].weight` -> `model.layers.0.weight`."""
    root, *steps = [a or b or c for a, b, c in _STEP.findall(source.removeprefix("L"))] or [""]
    steps = ["args", *steps] if root == "args" else steps
    return ".".join(s for s in steps if s not in _TABLES)


def _rename(graph: fx.Graph) -> None:
    for node in graph.nodes:
        name = path_of(node) if node.op == "placeholder" else ""
        op = typed_op(node.target) if node.op == "call_function" else None
        name = op.name if op else name
        name = re.sub(r"\W|^(?=\d)", "_", name)
        if name and not keyword.iskeyword(name):
            node._rename(name)


def adapter_tensors(gm: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The real tensors of ours that a graph reads: of adapters and of storage."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and _GRAFTED.search(path_of(node)):
            value = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(value, torch.Tensor):
                yield value


def parameters(gm: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The real parameters that a graph reads, for one that reads nothing of ours."""
    for node in gm.graph.nodes:
        value = getattr(node.meta.get("grapharg"), "example", None) if node.op == "placeholder" else None
        if isinstance(value, torch.nn.Parameter):
            yield value
