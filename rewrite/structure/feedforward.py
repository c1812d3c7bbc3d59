"""Feed-forward networks in a trace: a projection behind an activation function, and what it is made of.

down(act(up(x)))                plain
down(act(gate(x)) * up(x))      gated: the factor with the activation is the gate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from rewrite.structure.flow import Flow, Projection, common
from rewrite.structure.operators import ACTIVATION, MULTIPLY, name_of
from rewrite.structure.replay import channels, slope

Mask = tuple[bool, ...]
Parts = tuple[tuple[Projection, Mask | None], ...]
"""Projections, each with the channels of it that count, None for all."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward network: (projection, channels of it or None for all) for each of its parts."""

    down: Projection
    up: Parts
    gate: Parts


def feed_forwards(flow: Flow, taken: set[str], block: Callable[[str], str]) -> Iterator[FeedForward]:
    """Every feed-forward network of projections that are not `taken`, inside one block each.

    `block` gives the path of the block that a parameter is in, '' for none.
    """
    mixing = {path for node in flow.mixers for path in node.meta["scope"]}
    modulating = _modulating(flow)
    for down in flow.projections.values():
        if down.kind not in ("linear", "expert") or down.parameter in taken or down.out in modulating:
            continue
        inside = _behind_convolutions(flow, down.x)
        if not any(name_of(n) in ACTIVATION for n in inside) or any(n in flow.residual | flow.mixers for n in inside):
            continue  # a network is made of projections alone; what gates the residual stream is none
        home = block(down.parameter)
        ups = [p for p in _linear(flow, inside) if p.parameter not in taken and block(p.parameter) == home]
        module = common(p.owner for p in (*ups, down))
        if len(module) > len(home) and module in mixing:  # a sequence mixer of its own
            continue
        gate = _gate(flow, ups, down)
        up, gates = gate or (tuple((u, None) for u in ups), ())
        up, gates = _as_wide(up, down), _as_wide(gates, down)
        if up and not _mixes_tokens(flow, [p for p, _ in up], down):
            yield FeedForward(down, up, gates)


def _modulating(flow: Flow) -> set[fx.Node]:
    """Projections that scale, shift and gate a block's stream, and what these alone are made of.

    The stream passes them on to other projections and to its residual adds alike, which no feed-forward network does.
    """
    found: set[fx.Node] = set()
    for node in reversed(list(flow.projections)):
        readers = flow.readers(node)
        projections = [r for r in readers if r in flow.projections]
        added = any(r in flow.residual for r in readers)
        if projections and (added or all(r in found for r in projections)) and not set(readers) & flow.mixers:
            found.add(node)
    return found


def _as_wide(parts: Parts, down: Projection) -> Parts:
    """The parts with a channel for every input of the last projection; a router has fewer."""
    return tuple(
        (p, mask) for p, mask in parts if (sum(mask) if mask else p.out.meta["val"].shape[p.channel]) == down.width
    )


def _behind_convolutions(flow: Flow, node: fx.Node) -> set[fx.Node]:
    """The segment before a node, and on through convolutions in it (a depthwise one stands in some networks)."""
    found, todo = set[fx.Node](), [node]
    while todo:
        segment = flow.segment_before(todo.pop())
        todo += [
            flow.projections[n].x
            for n in segment - found
            if n in flow.projections and flow.projections[n].kind == "conv"
        ]
        found |= segment
    return found


def _linear(flow: Flow, nodes: set[fx.Node]) -> list[Projection]:
    found = [flow.projections[n] for n in sorted(nodes, key=flow.order.__getitem__) if n in flow.projections]
    return [p for p in found if p.kind in ("linear", "expert")]


def _mixes_tokens(flow: Flow, ups: list[Projection], down: Projection) -> bool:
    """Whether one token at the end depends on several at the start: then it is a sequence mixer."""
    if down.x.meta["val"].ndim < 2:
        return False
    for up in ups:
        lanes = slope(flow, up.out, down.x, lane=-1)
        if lanes is not None and up.channel == lanes.ndim - 1:
            if int((lanes.flatten(0, -2) != 0).any(1).sum()) > 1:
                return True
    return False


def _gate(flow: Flow, ups: list[Projection], down: Projection) -> tuple[Parts, Parts] | None:
    """(up, gate) parts of a gated network, by the product whose factors are different channels."""
    segment = flow.segment_before(down.x)
    products = [n for n in segment if name_of(n) in MULTIPLY]
    for product in sorted(products, key=flow.order.__getitem__, reverse=True):
        factors = [a for a in product.args[:2] if isinstance(a, fx.Node) and a in segment and a in flow.data]
        if len(factors) != 2:
            continue
        first, second = (_parts(flow, ups, f) for f in factors)
        if not first or not second or _same(first, second):
            continue
        bent = [_activated(flow, f) for f in factors]
        if bent == [False, True]:
            return first, second
        if bent == [True, False]:
            return second, first
    return None


def _parts(flow: Flow, ups: list[Projection], node: fx.Node) -> Parts:
    """The channels of each projection that a node depends on."""
    found = []
    for up in ups:
        mask = channels(flow, up, node)
        if mask is not None and any(mask):
            found.append((up, None if all(mask) else mask))
    return tuple(found)


def _same(first: Parts, second: Parts) -> bool:
    return [(p.out, m) for p, m in first] == [(p.out, m) for p, m in second]


def _activated(flow: Flow, node: fx.Node) -> bool:
    return any(name_of(n) in ACTIVATION for n in flow.segment_before(node))
