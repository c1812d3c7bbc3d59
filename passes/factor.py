"""factor: what reads a weight `W + scale * B A` becomes the product with W and a factored branch.

For weights that their layer does not read in its own call (experts, `nn.MultiheadAttention`, tied weights).  How an
operation treats such a weight is the table of `codegen.factored`: one rule for each reader, all in one walk, so that
the weight moves through its views to the product that reads it.  A reader that is not in the table, or that needs
every entry, keeps the dense weight, and the user is told.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

import rewrite.codegen.weights as weights
from rewrite.codegen.factored import READERS, Factored, Reader, reader_of
from rewrite.passes.inline import inline
from rewrite.passes.operators import add, attention, linear, low_rank_weight, narrow, pad
from rewrite.passes.pattern import Captures, Pattern, Where, shared
from rewrite.passes.record import GraphRecord
from rewrite.passes.rule import Rule, items_of, rule, target_name


def _updated(node: fx.Node) -> bool:
    return low_rank_weight.arguments(node) is not None


class Reads(Pattern):
    """An operation of the table on a weight with a low-rank update; the weight may have other readers."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        if not isinstance(node, fx.Node) or _spelled(node) is not self.reader:
            return None
        weights = [n for n in node.all_input_nodes if _updated(n)]
        if not weights or not all(n.meta["example_value"].layout == torch.strided for n in weights):
            return None
        matched += [node, *weights]
        return {**captures, "node": node}

    def names(self) -> set[str]:
        return {"node"}

    def __repr__(self) -> str:
        return f"{self.reader.name}(low_rank_weight)"


def _spelled(node: fx.Node) -> Reader | None:
    """The reader that a node is a call of."""
    if node.op not in ("call_function", "call_method"):
        return None
    return reader_of(node.args[1] if node.target is builtins.getattr else node.target)


def _rule_of(reader: Reader) -> Rule:
    def body(r: Any, node: Any) -> Any:
        call = node.node
        args = call.args[:1] if call.target is builtins.getattr else call.args
        args, kwargs = fx.map_arg((args, dict(call.kwargs)), lambda n: _open(r, n))
        result = reader(*args, **kwargs)
        if result is NotImplemented or (isinstance(result, tuple) and items_of(call) is None):
            return None
        if isinstance(result, (tuple, Factored)):
            return [_close(p) for p in result] if isinstance(result, tuple) else _close(result)
        _disown(r.made, {parts[0] for n in call.all_input_nodes if (parts := low_rank_weight.arguments(n))})
        return result

    body.__doc__ = reader.equation
    return rule(Reads(reader), name=f"factor_{reader.name.strip('_')}")(body)


def _disown(made: list[fx.Node], bases: set[fx.Node]) -> None:
    """The product with W is the model's own: later passes look for adapters among what this one made."""
    for node in made:
        if bases.intersection(node.all_input_nodes):
            del node.meta["rule"]


def _open(r: Any, node: fx.Node) -> Any:
    parts = low_rank_weight.arguments(node)
    return r.proxy(node) if parts is None else Factored(*r.proxy(parts))


def _close(value: Any) -> Any:
    if not isinstance(value, Factored):
        return value
    return torch.ops.rewrite.low_rank_weight(value.W, value.A, value.B, value.scale, value.transposed)


def _adapted_attention(node: fx.Node) -> bool:
    return attention.arguments(node) is not None and any(_updated(n) for n in node.all_input_nodes)


@rule(Where("node", _adapted_attention, "multi_head_attention_forward(x, low_rank_weight)"))
def open_attention(r: Any, node: Any) -> Any:
    """multi_head_attention_forward(x, W + s B A)  ->  its projections and its attention"""
    if items_of(node.node) is None:
        return None
    return inline(r, weights.attention, node.node.args, node.node.kwargs)


@rule(low_rank_weight(low_rank_weight("W", "A1", "B1", "s1", "t1"), "A2", "B2", "s2", "t2"))
def stack(r: Any, W: Any, A1: Any, B1: Any, s1: Any, t1: Any, A2: Any, B2: Any, s2: Any, t2: Any) -> Any:
    """W + s (B1 A1) + s (B2 A2)  ->  W + s cat(B1, B2) cat(A1, A2), for experts"""
    # Of a single matrix the fused operator takes two branches, each with its own rows.
    if W.ndim < 3 or t1 != t2 or A1.dtype != A2.dtype or not s2:
        return None
    B1 = B1 if s1 == s2 else B1 * (s1 / s2)
    return torch.ops.rewrite.low_rank_weight(W, torch.cat([A1, A2], -2), torch.cat([B1, B2], -1), s2, t2)


# Rows of a fused weight: their B stands padded with zeros, and whoever reads a slice reads mostly zeros.


padded = shared(pad("B", "padding", "mode"))


@rule(narrow(padded, "dim", "start", "length"))
def narrow_padded(r: Any, B: Any, padding: Any, mode: Any, dim: Any, start: Any, length: Any) -> Any:
    """narrow(pad(B), rows)  ->  pad(B), with the zeros that are among the rows, or a part of it"""
    if not _pads_rows(padding) or dim not in (-2, B.ndim - 2):
        return None
    first, last = start - padding[2], start + length - padding[2]  # as rows of B
    kept = range(max(first, 0), min(last, B.shape[-2]))
    if not kept:
        return None
    part = B if len(kept) == B.shape[-2] else B.narrow(-2, kept.start, len(kept))
    around = [kept.start - first, last - kept.stop]
    return F.pad(part, [0, 0, *around]) if any(around) else part


@rule(add("y", linear("h", narrow(padded, "dim", "start", "length"))))
def drop_zeros(r: Any, y: Any, h: Any, B: Any, padding: Any, mode: Any, dim: Any, start: Any, length: Any) -> Any:
    """y + linear(h, narrow(pad(B), other rows))  ->  y"""
    if not _pads_rows(padding) or dim not in (-2, B.ndim - 2):
        return None
    first = start - padding[2]
    return y if first + length <= 0 or first >= B.shape[-2] else None


@rule(linear("h", padded))
def linear_padded(r: Any, h: Any, B: Any, padding: Any, mode: Any) -> Any:
    """linear(h, pad(B, rows))  ->  pad(linear(h, B), columns)"""
    return F.pad(F.linear(h, B), padding[2:]) if _pads_rows(padding) and B.ndim == 2 else None


def _pads_rows(padding: Any) -> bool:
    return len(padding) == 4 and list(padding[:2]) == [0, 0] and min(padding[2:]) >= 0


OPEN = (open_attention, stack)
FACTOR = tuple(_rule_of(reader) for reader in READERS)
ROWS = (narrow_padded, drop_zeros, linear_padded)


def sweep(graph: fx.Graph) -> None:
    """Erase what rules made and nobody reads: a weight before its views, branches that another rule computes anew."""
    for node in reversed(graph.nodes):
        ours = "rule" in node.meta or _updated(node)
        if ours and not node.users and not _random(node):
            graph.erase_node(node)


def _random(node: fx.Node) -> bool:
    return "dropout" in str(node.target) or "attention" in str(node.target)


def note_dense(graph: fx.Graph, record: GraphRecord) -> None:
    """Tell of every reader that keeps a dense weight, once a site and operation."""
    told = set()
    for node in graph.nodes:
        for user in node.users if _updated(node) else ():
            place, name = str(node.meta.get("site", "")), target_name(user.target)
            if (place, name) not in told:
                record.note(place, f"not factored: {name}; it reads the dense weight")
                told.add((place, name))
