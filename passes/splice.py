"""Splicing references into an exported graph, where the graph is all there is: ATen operators in, nothing else.

A reference is traced with `make_fx` on the fake values of the nodes that it reads, symbolic sizes included, so
the result stays a valid exported program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx


def splice(
    graph: fx.Graph, function: Callable[..., Any], inputs: Sequence[fx.Node | None], after: fx.Node, rule: str
) -> fx.Node:
    """Insert `function(*inputs)` behind `after` as ATen nodes; returns the node of its result.  None stays None."""
    given = [node for node in inputs if node is not None]
    values = [node.meta["val"] for node in given]

    def call(*present: Any) -> Any:
        rest = iter(present)
        return function(*(None if node is None else next(rest) for node in inputs))

    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*values)
    mapping: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    last = after
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with graph.inserting_after(last):
            last = graph.node_copy(node, lambda n: mapping[n])
        last.meta = {k: v for k, v in after.meta.items() if k != "val"} | {"val": node.meta.get("val"), "rule": rule}
        mapping[node] = last
    result = next(iter(traced.graph.find_nodes(op="output"))).args[0]
    return mapping[result]


def module_calls(graph: fx.Graph, path: str) -> list[list[fx.Node]]:
    """The nodes of each call of the module at `path`, in program order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        inner = [p for p, _ in stack.values()][-1:] or [""]
        if node.op == "call_function" and inner[0].partition("@")[0] == path:
            calls.setdefault(inner[0], []).append(node)
    return list(calls.values())


def boundary(call: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(input, output) of a module call: its first activation from outside, its last value used outside."""
    inside = set(call)
    outputs = [n for n in call if any(u not in inside for u in n.users)]
    inputs = [a for n in call for a in n.all_input_nodes if a not in inside]
    activations = [a for a in inputs if not _is_state(a) and isinstance(a.meta.get("val"), torch.Tensor)]
    return (activations[0], outputs[-1]) if activations and outputs else None


def _is_state(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.name.startswith(("p_", "b_", "c_"))
