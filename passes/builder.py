"""Building fx nodes from ordinary PyTorch code, with shapes and provenance on every new node.

`Builder.proxy(nodes)` gives proxies that know their dtype and shape, so a reference written for tensors becomes
nodes when it runs on them.  Every node that it makes carries `example_value` (a fake tensor), the site that it
belongs to and the rule that made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import GraphAppendingTracer

from rewrite.passes.record import GraphRecord

META = ("nn_module_stack", "stack_trace", "site", "source_fn_stack", "custom")


class MetaProxy(fx.Proxy):
    """A proxy that answers questions about dtype, shape and device instead of recording them."""

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["example_value"].dtype

    @property
    def device(self) -> torch.device:
        return self.node.meta["example_value"].device

    @property
    def shape(self) -> torch.Size:
        return self.node.meta["example_value"].shape

    @property
    def ndim(self) -> int:
        return self.node.meta["example_value"].ndim

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


class _Tracer(GraphAppendingTracer):
    def __init__(self, builder: Builder) -> None:
        super().__init__(builder.graph)
        self.builder = builder

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return MetaProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.builder.adopt(node)
        return node


class Builder:
    """Makes nodes in one graph on behalf of one rule."""

    def __init__(self, graph: fx.Graph, rule: str, log: GraphRecord) -> None:
        self.graph, self.rule, self.log = graph, rule, log
        # Of the values themselves: Dynamo runs a backend under another mode than the one it traced with.
        values = (n.meta.get("example_value") for n in graph.nodes)
        self.fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
        self.regions = _autocast_regions(graph)
        self.made: list[fx.Node] = []
        self.origin: fx.Node | None = None
        self._tracer = _Tracer(self)

    @contextlib.contextmanager
    def at(self, origin: fx.Node) -> Iterator[None]:
        """New nodes go before `origin` and inherit its provenance."""
        self.origin, self.made = origin, []
        with self.graph.inserting_before(origin):
            yield

    def adopt(self, node: fx.Node) -> None:
        """Give a new node its shape and provenance."""
        if self.origin is not None:
            node.meta.update({k: v for k, v in self.origin.meta.items() if k in META})
            self.regions[node] = self.regions.get(self.origin, ())
        node.meta["rule"] = self.rule
        node.meta["example_value"] = self.evaluate(node)
        self.made.append(node)

    def evaluate(self, node: fx.Node) -> Any:
        """The fake value of a node from those of its inputs."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        with self.fake(), contextlib.ExitStack() as stack:
            for region in self.regions.get(node, ()):
                stack.enter_context(torch.autocast(*region))
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def fake(self) -> Iterator[None]:
        """Where fake values are computed: gradients tracked, so that freezing shows."""
        with self.fake_mode or contextlib.nullcontext(), torch.enable_grad():
            yield

    def proxy(self, value: Any) -> Any:
        """Nodes inside `value` as proxies."""
        return fx.map_arg(value, self._tracer.proxy)  # type: ignore[arg-type]  # proxies stand in for nodes

    def note(self, text: str) -> None:
        """Tell the user something about the site at hand."""
        self.log.note(str(self.origin.meta.get("site", "")) if self.origin else "", text)

    def hoist(self, node: fx.Node, before: fx.Node) -> None:
        """Move a node, and what it needs, to where `before` can use it.  Only for pure nodes."""
        if node < before:
            return
        for needed in node.all_input_nodes:
            self.hoist(needed, before)
        before.prepend(node)


def _autocast_regions(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """The autocast regions of a captured forward around each of its nodes, as arguments of `torch.autocast`."""
    found, open_ = {}, dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            open_[node] = node.args
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            open_.pop(node.args[0])
        elif open_:
            found[node] = tuple(open_.values())
    return found


def unwrap(value: Any) -> Any:
    """Proxies inside nested lists and tuples as their nodes."""
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, (list, tuple)):
        return type(value)(unwrap(v) for v in value)
    return value


def example(node: Any) -> Any:
    """The fake value of a node, or the literal itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node
