"""fuse: base product + adapter branches + bias + dequantisation become one operator.

A layer whose base weight trains is left alone: the fused operator has no gradient for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewrite.passes.builder import example
from rewrite.passes.operators import adapted_linear, add, decode, inserted, linear, mul, pad
from rewrite.passes.pattern import any_of
from rewrite.passes.rule import rule

expand = linear(any_of(mul("h", "s"), "h"), "B")
branch = any_of(expand, pad(expand, "padding", "mode"))
base = any_of(linear("x", "w", "b"), adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts"))


@rule(linear("x", decode("stored", "layout"), "b"))
def fuse_storage(r: Any, x: Any, stored: Any, layout: Any, b: Any) -> Any:
    """linear(x, decode(stored), b)  ->  adapted_linear(x, stored, b)"""
    return torch.ops.rewrite.adapted_linear(x, stored, layout, b, [], [], [], [])


@rule(add(base, any_of(branch, "c")))
def fuse_branch(r, x, w, b, stored, layout, hs, Bs, scales, starts, h, s, B, padding, mode, c) -> Any:
    """linear(x, w, b) + linear(h * s, B) + c  ->  adapted_linear(x, w, b + c, h, B, s)"""
    if stored is None:
        stored, layout, hs, Bs, scales, starts = [w], "dense", [], [], [], []
    if not inserted(r.origin) or not _fusible(mode, c, r.origin):
        return None
    if isinstance(s, fx.Proxy):  # a gate or a diagonal core, on the (..., r) product
        h, s = h * s, None
    if any(example(t.node).requires_grad for t in stored):
        r.note("not fused: its base weight is trained")
        return None
    if c is not None:
        return torch.ops.rewrite.adapted_linear(
            x, list(stored), layout, c if b is None else b + c, list(hs), list(Bs), list(scales), list(starts)
        )
    scale, start = 1.0 if s is None else float(s), 0 if padding is None else padding[0]
    return torch.ops.rewrite.adapted_linear(
        x, list(stored), layout, b, [*hs, h], [*Bs, B], [*scales, scale], [*starts, start]
    )


def _fusible(mode: Any, c: Any, y: Any) -> bool:
    """A branch, or a shift: one value per output, the same for every row."""
    if c is not None:
        return isinstance(c, fx.Proxy) and tuple(example(c.node).shape) == tuple(example(y).shape[-1:])
    return mode in (None, "constant")


FUSE = (fuse_storage, fuse_branch)
