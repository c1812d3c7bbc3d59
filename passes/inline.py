"""Replaces a node by the operations that its function is made of, found by running it on fake tensors.

Dynamo keeps some functions of `torch.nn.functional` as one node; rules look for what stands inside.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rewrite.passes.builder import Builder


class _Recorder(TorchFunctionMode):
    """Every torch function that runs, as a node."""

    def __init__(self, builder: Builder, nodes: dict[int, fx.Node]) -> None:
        super().__init__()
        self.builder, self.nodes = builder, nodes
        self.alive: list[Any] = []  # a tensor is known by its identity, which must not be given to another one
        self.sizes: dict[sympy.Expr, fx.Node] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            self.enter(self.record(func, args, kwargs or {}), value)
        return value

    def record(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        args, kwargs = tree_map(self.node_of, args), tree_map(self.node_of, kwargs)
        name = getattr(func, "__name__", "")
        graph = self.builder.graph
        if name == "__get__":
            node = graph.call_function(getattr, (args[0], func.__self__.__name__))
        elif name.startswith("__") and hasattr(operator, name):
            node = graph.call_function(getattr(operator, name), args, kwargs)
        elif getattr(torch.Tensor, name, None) is func:
            node = graph.call_method(name, args, kwargs)
        else:
            node = graph.call_function(func, args, kwargs)
        self.builder.adopt(node)
        return node

    def enter(self, node: fx.Node, value: Any) -> None:
        """Remember which node stands for a tensor, or for each of a list."""
        self.alive.append(value)
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
            return
        for i, item in enumerate(value):
            if isinstance(item, torch.Tensor):
                part = self.builder.graph.call_function(operator.getitem, (node, i))
                self.builder.adopt(part)
                self.enter(part, item)

    def node_of(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self.size(value.node.expr)
        if isinstance(value, torch.Size):
            return tuple(self.node_of(size) for size in value)
        return self.nodes[id(value)] if isinstance(value, torch.Tensor) else value

    def size(self, expr: sympy.Expr) -> Any:
        """A dynamic size as a node: read off a tensor that has it, or computed from those of its symbols."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self.sizes:
            self.sizes[expr] = self.read(expr) or self.computed(expr)
        return self.sizes[expr]

    def read(self, expr: sympy.Expr) -> fx.Node | None:
        for node in self.nodes.values():
            for dim, size in enumerate(node.meta["example_value"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    return self.made(self.builder.graph.call_method("size", (node, dim)))
        return None

    def computed(self, expr: sympy.Expr) -> fx.Node:
        step = {sympy.Mul: operator.mul, sympy.Add: operator.add}.get(expr.func)
        if step is None:
            raise NotImplementedError(f"no node for the size {expr}")
        parts = [self.size(part) for part in expr.args]  # type: ignore[arg-type]
        return functools.reduce(lambda a, b: self.made(self.builder.graph.call_function(step, (a, b))), parts)

    def made(self, node: fx.Node) -> fx.Node:
        self.builder.adopt(node)
        return node


def inline(builder: Builder, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The result of `function(*args, **kwargs)` as nodes, made of the operations that it calls.

    Tensors among the arguments are nodes with fake values; a result may be a tuple.
    """
    nodes: dict[int, fx.Node] = {}
    args, kwargs = fx.map_arg((args, dict(kwargs)), lambda n: _enter(nodes, n))
    recorder = _Recorder(builder, nodes)
    with builder.fake(), recorder:
        result = function(*args, **kwargs)
    return tree_map(recorder.node_of, result)


def _enter(nodes: dict[int, fx.Node], node: fx.Node) -> Any:
    value = node.meta["example_value"]
    nodes[id(value)] = node
    return value
