"""segment: adapters that the rows of a batch choose among are computed for the rows that chose them.

Part of the fuse pass.  A gate for every row says how much of an adapter a row takes; with many adapters most are zero.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rewrite.passes.builder import example
from rewrite.passes.operators import adapted_linear, cat, linear, mul, segmented_shrink, split
from rewrite.passes.rule import rule

_LIGHT = {"cuda": 32, "cpu": 8}
"""How many times the summed rank is below the narrower side of a layer where all adapters are computed for all rows.

Their products are then a few per cent of the layer's own, and one pass over the output has them all.  On a CPU (768 x
2048, rank 16) a step was 0.9 times as fast with 4 adapters and 1.3 times with 16.
"""


@rule(adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts"))
def segment(r, x, stored, layout, b, hs, Bs, scales, starts) -> Any:
    """adapted_linear(x, w, b, linear(x, A) * g, B)  ->  segmented_linear(x, w, b, segmented_shrink(x, A, g), B, g)

    Adapters stand side by side in A, B and the gate, which has a number for every row of the batch and every rank.
    """
    gated = [found for h in hs if (found := _gated(h.node, x.node)) is not None]
    if len(gated) < 2 or len(gated) < len(hs):
        return None
    d_out = example(r.origin).shape[-1]
    ranks = [int(h.shape[-1]) for h in hs]
    if any(B.shape[0] != d_out for B in Bs) or sum(ranks) * _LIGHT.get(x.device.type, 32) < min(d_out, x.shape[-1]):
        return None
    gates = [
        _times(r.proxy(gate).reshape(-1, 1), scale).expand(-1, rank)
        for (_, gate), scale, rank in zip(gated, scales, ranks, strict=True)
    ]
    gate = torch.cat(gates, 1)
    h = torch.ops.rewrite.segmented_shrink(x, torch.cat([r.proxy(A) for A, _ in gated]), gate)
    B = torch.cat([B if B.dtype == x.dtype else B.to(x.dtype) for B in Bs], 1)
    return torch.ops.rewrite.segmented_linear(x, stored, layout, b, h, B, gate)


def _times(gate: Any, scale: float) -> Any:
    return gate if scale == 1.0 else gate * scale


def _gated(h: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(A, gate) of a node `linear(x, A) * gate`, the gate a number for every row of the batch."""
    found = mul.arguments(h)
    if found is None or not isinstance(found[1], fx.Node):
        return None
    down, gate = _down(found[0], x), found[1]
    shape = example(gate).shape
    by_row = len(shape) == example(x).ndim > 1 and all(size == 1 for size in shape[1:]) and shape[0] != 1
    return (down, gate) if down is not None and by_row else None


def _down(h: Any, x: fx.Node) -> fx.Node | None:
    """A of a node that is `linear(x, A)`, or what `batch` made of that: an item of `split(linear(x, cat(A, ...)))`."""
    if isinstance(h, fx.Node) and h.target is operator.getitem:
        parts = split.arguments(h.args[0])
        whole = linear.arguments(parts[0]) if parts else None
        joined = cat.arguments(whole[1]) if whole else None
        return joined[0][h.args[1]] if joined and whole and whole[0] is x else None
    found = linear.arguments(h)
    return found[1] if found and found[0] is x and found[2] is None else None


@rule(segmented_shrink("x", "A", "gate"), group="x")
def batch_segments(r: Any, x: Any, A: Any, gate: Any) -> Any:
    """segmented_shrink(x, A1, g1), segmented_shrink(x, A2, g2)  ->  split(segmented_shrink(x, cat(A), cat(g)))"""
    if len(A) < 2:
        return None
    joined = [part for each in A for part in _parts(each.node)]
    h = torch.ops.rewrite.segmented_shrink(x, torch.cat(r.proxy(joined)), torch.cat(gate, 1))
    parts = h.split([int(a.shape[0]) for a in A], dim=-1)
    return [parts[i] for i in range(len(A))]


def _parts(node: fx.Node) -> list[fx.Node]:
    found = cat.arguments(node)
    return list(found[0]) if found else [node]


SEGMENT = (segment, batch_segments)
