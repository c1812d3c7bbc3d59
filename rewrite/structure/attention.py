"""Attention in a trace: the products of activations that make it, and the projections behind query, key and value.

scores = q k'        one product of activations, in a fused operator or by itself
softmax(scores) v    a second one, behind a softmax over the keys
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from rewrite.structure.flow import Flow
from rewrite.structure.operators import ATTENTION, CONTRACTION, SOFTMAX, name_of
from rewrite.structure.replay import slope


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: its operands and its result, as nodes; the size of a head of queries and keys, and of values;
    what stands for its mask, if anything does, and whether the operator is told to mask what comes later."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    head: int
    value_head: int
    bias: fx.Node | None = None
    causal: bool = False  # by an argument of the operator

    @property
    def scope(self) -> tuple[str, ...]:
        return self.out.meta["scope"]


def attentions(flow: Flow) -> list[Attention]:
    """Every attention of a trace, in program order."""
    found = [*_fused(flow), *_softmax(flow)]
    return sorted(found, key=lambda a: flow.order[a.out])


def _fused(flow: Flow) -> Iterator[Attention]:
    for node in flow.mixers:
        if name_of(node) in ATTENTION:
            q, k, v = node.args[:3]
            named = _named(node)
            mask = next((m for n in MASK if isinstance(m := named.get(n), fx.Node)), None)
            heads = q.meta["val"].shape[-1], v.meta["val"].shape[-1]  # type: ignore[union-attr]
            yield Attention(q, k, v, node, *heads, mask, bool(named.get("is_causal")))  # type: ignore[arg-type]


MASK = ("attn_mask", "attn_bias")


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _softmax(flow: Flow) -> Iterator[Attention]:
    for node in flow.data:
        if name_of(node) not in SOFTMAX:
            continue
        scores = [m for m in flow.segment_before(node) if m in flow.mixers and name_of(m) not in ATTENTION]
        for product in [m for m in flow.readers(node) if m in flow.mixers and name_of(m) not in ATTENTION]:
            value, value_head = _value(flow, node, product)
            for score in scores:
                head = _factors(score)[0].meta["val"].shape[-1]
                yield Attention(*_query_key(flow, score, node), value, product, head, value_head, node.args[0])  # type: ignore[arg-type]


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    start = CONTRACTION[name_of(product)]
    left, right = product.args[start : start + 2]
    return left, right  # type: ignore[return-value]


def _value(flow: Flow, softmax: fx.Node, product: fx.Node) -> tuple[fx.Node, int]:
    """What the probabilities are multiplied with, and the size of a head of it."""
    left, right = _factors(product)
    if left in flow.segment_after(softmax):
        return right, right.meta["val"].shape[-1]
    return left, left.meta["val"].shape[-2]


def _query_key(flow: Flow, score: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(query, key) of a score product: one lane of the softmax varies along the keys alone."""
    left, right = _factors(score)
    source, dim = softmax.args[:2]
    lane = slope(flow, score, source, lane=dim)  # type: ignore[arg-type]
    if lane is None or lane.ndim < 2:
        return left, right
    moved = (lane != 0).flatten(0, -3).any(0) if lane.ndim > 2 else lane != 0
    return (left, right) if moved.any(0).sum() >= moved.any(1).sum() else (right, left)
