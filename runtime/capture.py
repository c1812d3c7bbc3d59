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
    return any(n.op == "call_function" and typed_op(n.target) is not None for n in gm.graph.nodes)


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
    new_gm._param_name_to_source = gm._param_name_to_source  # type: ignore[attr-defined]
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
    """The real tensors behind the placeholders that typed nodes read."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or typed_op(node.target) is None:
            continue
        for needed in node.all_input_nodes:
            argument = needed.meta.get("grapharg") if needed.op == "placeholder" else None
            value = getattr(argument, "example", None)
            if isinstance(value, torch.Tensor):
                yield value
