"""What a training step keeps for its backward, where a spec says so: rules, markers in captured graphs, and regions.

A rule reaches a graph as a marker: a typed identity that a hook of a module emits.  `collect` takes markers out again,
`label` writes each rule on the nodes that it is about; AOTAutograd carries the label over to the nodes of the joint
graph, backward ones too, and `passes.partition` does what it says.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from rewrite.codegen.codecs import Codec
from rewrite.codegen.typed import typed, typed_op

_LABEL = "rewrite_keep"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the values that a clause is about; `label` is the clause.

    `family` names sites that belong together: those of one block stand for everything between them too, as
    the projections of an attention do.
    """

    label: str = ""
    family: str = ""
    local: ClassVar[bool] = True  # what it does to one block does not depend on the others


@dataclass(frozen=True, kw_only=True)
class Encoded(Rule):
    """Saved values are stored by `codec`, and decoded where the backward reads them."""

    codec: Codec


@dataclass(frozen=True, kw_only=True)
class Coarse(Rule):
    """Nonlinearities store their derivative in so many bits; `approximate` ones too, where it has more values."""

    bits: int
    approximate: bool


@dataclass(frozen=True, kw_only=True)
class Recomputed(Rule):
    """Nothing inside is saved: the backward computes it again."""


@dataclass(frozen=True, kw_only=True)
class Budgeted(Rule):
    """Of what min-cut would save, at most `fraction` is; the rest is recomputed, the cheapest first."""

    local: ClassVar[bool] = False
    fraction: float


Placed = tuple[str, Rule]
"""(path of a module, rule about it); the path '' is the whole graph."""


@functools.cache
def marker(rule: Rule) -> Callable[[Any], Any]:
    """An identity that a captured graph shows as one node, which carries the rule."""
    node = typed("keep", "keep", lambda x: x)
    node.rule = rule  # type: ignore[attr-defined]
    return node


def collect(graphs: Iterable[fx.Graph]) -> list[Placed]:
    """Take the markers out of captured graphs: the rules that they carry, by the path of the module."""
    found: dict[Placed, None] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            op = typed_op(node.target) if node.op == "call_function" else None
            if op is None or op.kind != "keep":
                continue
            found[str(node.meta.get("site", "")), node.target.rule] = None
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return list(found)


def label(graphs: Iterable[fx.Graph], placed: Sequence[Placed]) -> None:
    """Write on every node which rules it is subject to, those about single modules and their regions."""
    groups: dict[tuple[Rule, str], list[str]] = defaultdict(list)
    for path, rule in placed:
        if path and not isinstance(rule, Budgeted):
            groups[rule, block(path) if rule.family else path].append(path)
    for graph in graphs:
        for (rule, _), paths in groups.items():
            for node in _region(graph, paths, bool(rule.family)):
                custom = node.meta.get("custom") or {}
                node.meta["custom"] = custom | {_LABEL: (*custom.get(_LABEL, ()), rule)}


def rules_of(node: fx.Node) -> tuple[Rule, ...]:
    """The rules that a node of a captured, joint or partitioned graph is subject to."""
    return (node.meta.get("custom") or {}).get(_LABEL, ())


def block(path: str) -> str:
    """The repeated block that a module is in: its path up to the first number, '' where there is none.

    >>> block("model.layers.3.mlp.experts.5.up")
    'model.layers.3'
    """
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])


def _region(graph: fx.Graph, paths: Collection[str], between: bool) -> list[fx.Node]:
    """The nodes of these modules, and with `between` those on a way from one of them to another."""
    nodes = list(graph.nodes)
    prefixes = tuple(f"{path}." for path in paths)
    inside = [n for n in nodes if (site := str(n.meta.get("site", ""))) in paths or site.startswith(prefixes)]
    inside = [n for n in inside if n.op not in ("placeholder", "output")]
    if not between or not inside:
        return inside
    seeds = set(inside)
    first, last = nodes.index(inside[0]), nodes.index(inside[-1])
    window = [n for n in nodes[first : last + 1] if n.op not in ("placeholder", "get_attr", "output")]
    behind, ahead = set(seeds), set(seeds)
    for node in window:
        if _is_value(node) and any(i in behind for i in node.all_input_nodes):
            behind.add(node)
    for node in reversed(window):
        if _is_value(node) and any(u in ahead for u in node.users):
            ahead.add(node)
    return [n for n in window if n in behind and n in ahead]


def _is_value(node: fx.Node) -> bool:
    """Whether a node computes tensors: sizes of one connect what has nothing to do with another."""
    value = node.meta.get("example_value")
    return isinstance(value, (torch.Tensor, tuple, list))
