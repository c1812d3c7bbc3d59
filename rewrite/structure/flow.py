"""A trace as a graph to ask questions of: projections, mixers, residual adds, and the segments between them.

A *projection* applies a parameter to an activation (linear, convolution, lookup, experts).  A *mixer* multiplies
activations with each other.  Cutting the graph in front of both leaves *segments*: what happens between two
of them is norms, activation functions, rotary embeddings, splits and views.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from rewrite.structure.labels import Labels, weight_labels
from rewrite.structure.operators import (
    ADD,
    ATTENTION,
    BLANK,
    CONTRACTION,
    CONVOLUTION,
    LOOKUP,
    TRANSPOSED,
    VIEW,
    WEIGHT_STEP,
    name_of,
)
from rewrite.structure.trace import Trace

Kind = Literal["linear", "conv", "embedding", "expert"]


@dataclass(frozen=True, eq=False)
class Projection:
    """One application of a parameter to an activation.

    `labels` says which entry of the parameter each output channel is made of; `channel` is the dimension of `out`
    that counts them, `width` the number of inputs that are summed over.
    """

    parameter: str
    kind: Kind
    x: fx.Node
    out: fx.Node
    labels: Labels
    channel: int
    width: int

    @property
    def scope(self) -> tuple[str, ...]:
        return self.out.meta["scope"]

    @property
    def owner(self) -> str:
        """Path of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    def __repr__(self) -> str:
        return f"<{self.kind} {self.parameter}>"


class Flow:
    """The dataflow of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = {node: number for number, node in enumerate(trace.graph.nodes)}
        self.graph: nx.DiGraph = nx.DiGraph()
        self.graph.add_nodes_from(self.order)
        self.graph.add_edges_from((a, n) for n in self.order if name_of(n) not in BLANK for a in n.all_input_nodes)
        self.data = self._data()
        self.weights = self._weights()
        self.projections: dict[fx.Node, Projection] = {}
        self.slopes: dict[str, torch.Tensor | None] = {}  # of `rewrite.structure.replay`
        self.mixers: set[fx.Node] = set()
        self._contractions()
        cuts = {*self.projections, *self.mixers}
        self.local = self._cut(cuts)
        self.residual = {n for n in self.data if self._is_residual(n)}
        self.segments = self._cut(cuts | self.residual)
        self.depthwise: set[fx.Node] = set()

    # --- what a node is ---

    def _data(self) -> set[fx.Node]:
        """Nodes whose value depends on the batch; constants and parameters alone do not count."""
        inputs = [n for n in self.order if n.meta.get("input")]
        return {*inputs, *(d for n in inputs for d in nx.descendants(self.graph, n))}

    def _weights(self) -> dict[fx.Node, fx.Node]:
        """Node -> the parameter that it is a view, a part or a cast of."""
        found: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            if node.op == "placeholder":
                if node.meta.get("names"):
                    found[node] = node
                continue
            first = node.args[0] if node.args else None
            source = found.get(first) if isinstance(first, fx.Node) else None
            if source is None or name_of(node) not in WEIGHT_STEP:
                continue
            gathers = any(a in self.data for a in node.all_input_nodes)
            if not gathers or len(source.meta["val"].shape) >= 3:
                found[node] = source
        return found

    def _contractions(self) -> None:
        for node in self.order:
            if node.op != "call_function" or node not in self.data:
                continue
            name = name_of(node)
            if name in ATTENTION:
                self.mixers.add(node)
            elif (pair := _operands(node, name)) is not None:
                self._contraction(node, name, *pair)

    def _contraction(self, node: fx.Node, name: str, left: fx.Node, right: fx.Node) -> None:
        # The weight is on the right, but for `W @ x` and a lookup.
        flipped = left in self.weights and (right not in self.weights or name in LOOKUP)
        x, weight = (right, left) if flipped else (left, right)
        if weight in self.weights and x in self.data:
            if (found := self._projection(node, name, x, weight, flipped)) is not None:
                self.projections[node] = found
        elif x in self.data and weight in self.data:
            self.mixers.add(node)

    def _projection(self, node: fx.Node, name: str, x: fx.Node, weight: fx.Node, flipped: bool) -> Projection | None:
        source = self.weights[weight]
        shape, last = source.meta["val"].shape, node.meta["val"].ndim - 1
        parameter = _named(source.meta["names"], node.meta["scope"])
        if name in CONVOLUTION:
            transposed = name in TRANSPOSED or (name.endswith("convolution") and bool(node.args[6]))
            return Projection(parameter, "conv", x, node, Labels(None, int(transposed), None), 1, shape[not transposed])
        if name in LOOKUP:
            return Projection(parameter, "embedding", x, node, Labels(None, 1, 0), last, shape[0])
        if len(shape) not in (2, 3):
            return None
        sums, outs = (-1, -2) if name == "linear" or flipped else (-2, -1)
        labels = weight_labels(source, weight, contracted=sums, output=outs)
        kind: Kind = "expert" if len(shape) == 3 else "linear"
        width = weight.meta["val"].shape[sums]
        return labels and Projection(parameter, kind, x, node, labels, last - 1 if flipped else last, width)

    def _is_residual(self, node: fx.Node) -> bool:
        """add(x, f(x)) with a projection or a mixer inside f."""
        if name_of(node) not in ADD:
            return False
        parts = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.data]
        shapes = {a.meta["val"].shape for a in (node, *parts)}
        if len(parts) < 2 or parts[0] is parts[1] or len(shapes) > 1:
            return False
        first, second = parts
        return any(
            self._reaches(root, other, cut=False) and not self._reaches(root, other, cut=True)
            for one, other in ((first, second), (second, first))
            for root in self._roots(one)
        )

    def _roots(self, node: fx.Node) -> list[fx.Node]:
        """A node and what it is a scaled or viewed copy of, or a sum with."""
        found, todo = [], [node]
        while todo and len(found) < 8:
            found.append(first := todo.pop(0))
            inputs = [a for a in first.all_input_nodes if a in self.data and not _counts(a)]
            if (
                first not in self.projections
                and first not in self.mixers
                and (len(inputs) == 1 or name_of(first) in ADD)
            ):
                todo += inputs
        return found

    def _reaches(self, start: fx.Node, end: fx.Node, cut: bool) -> bool:
        """Whether `end` depends on `start`; nodes are in program order, which bounds the search."""
        if cut:
            return start is end or (start in self.local and end in self.local and nx.has_path(self.local, start, end))
        floor, seen, todo = self.order[start], {end}, [end]
        while todo:
            node = todo.pop()
            if node is start:
                return True
            for a in node.all_input_nodes:
                if a not in seen and self.order[a] >= floor:
                    seen.add(a)
                    todo.append(a)
        return False

    def _cut(self, cuts: Iterable[fx.Node]) -> nx.DiGraph:
        """The data nodes without the edges into `cuts`, and without those that carry indices or conditions."""
        cut, data = set(cuts), {n for n in self.data if not _counts(n)}
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(self.data)
        graph.add_edges_from((a, b) for a, b in self.graph.edges if a in data and b in data and b not in cut)
        return graph

    def through_depthwise(self) -> Flow:
        """The same dataflow with segments that run on through depthwise convolutions: some queries take one."""
        found = copy.copy(self)
        found.slopes = {}
        found.depthwise = {n for n, p in self.projections.items() if p.kind == "conv" and p.width == 1}
        cuts = {*self.projections, *self.mixers} - found.depthwise
        found.local = self._cut(cuts)
        found.residual = {n for n in self.residual if found._is_residual(n)}
        found.segments = self._cut(cuts | found.residual)
        return found

    def past_residuals(self) -> Flow:
        """The same dataflow with segments that run on through residual adds."""
        found = copy.copy(self)
        found.slopes, found.segments = {}, self.local
        return found

    # --- questions ---

    def sources(self, node: fx.Node) -> list[Projection]:
        """The projections whose outputs a node is made of, in program order."""
        around = self.segment_before(node)
        made = [n for n in around if n in self.projections and n not in self.depthwise]
        return [self.projections[n] for n in sorted(made, key=self.order.__getitem__)]

    def segment_before(self, node: fx.Node) -> set[fx.Node]:
        """Everything that a node is made of, back to projections, mixers and residual adds, with these."""
        return {node, *nx.ancestors(self.segments, node)} if node in self.data else {node}

    def segment_after(self, node: fx.Node) -> set[fx.Node]:
        """Everything made of a node before the next projection, mixer or residual add."""
        return {node, *nx.descendants(self.segments, node)} if node in self.data else {node}

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The projections, mixers and residual adds that read a node's segment, in program order."""
        inside = self.segment_after(node)
        found = {u for n in inside for u in n.users if u in self.data and u not in inside}
        return sorted(found, key=self.order.__getitem__)

    @functools.cached_property
    def by_parameter(self) -> dict[str, list[Projection]]:
        """The projections that read each parameter."""
        found: dict[str, list[Projection]] = {}
        for projection in self.projections.values():
            found.setdefault(projection.parameter, []).append(projection)
        return found

    def strip(self, node: fx.Node) -> fx.Node:
        """What a node is a mere view or cast of."""
        while name_of(node) in VIEW and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node


def _operands(node: fx.Node, name: str) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product."""
    start = CONTRACTION.get(name)
    if start is None:
        return None
    pair = node.args[start : start + 2]
    return (pair[0], pair[1]) if len(pair) == 2 and all(isinstance(a, fx.Node) for a in pair) else None  # type: ignore[return-value]


def _counts(node: fx.Node) -> bool:
    """Whether a node holds indices or conditions, not activations."""
    dtype = getattr(node.meta["val"], "dtype", None)
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def _named(names: tuple[str, ...], scope: tuple[str, ...]) -> str:
    """The name that the running module gives to a parameter; of a tied one that it does not own, the first."""
    inside = scope[-1] if scope else ""
    return next((n for n in names if n.rpartition(".")[0] == inside), names[0])


def common(paths: Iterable[str]) -> str:
    """The innermost module that contains all of these paths.

    >>> common(["h.0.attn.q", "h.0.attn.out.dense"])
    'h.0.attn'
    """
    shared: list[str] = []
    for names in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
