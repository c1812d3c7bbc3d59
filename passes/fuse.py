"""fuse: base product + adapter branches + bias + dequantisation become one operator.

A layer whose base weight trains is left alone: the fused operator has no gradient for it.
"""

from __future__ import annotations

from typing import Any

import torch

from rewrite.passes.builder import example
from rewrite.passes.operators import adapted_linear, add, decode, linear, mul, pad
from rewrite.passes.pattern import any_of
from rewrite.passes.rule import rule

expand = linear(any_of(mul("h", "s"), "h"), "B")
base = any_of(linear("x", "w", "b"), adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts"))


@rule(linear("x", decode("stored", "layout"), "b"))
def fuse_storage(r: Any, x: Any, stored: Any, layout: Any, b: Any) -> Any:
    """linear(x, decode(stored), b)  ->  adapted_linear(x, stored, b)"""
    return torch.ops.rewrite.adapted_linear(x, stored, layout, b, [], [], [], [])


@rule(add(base, any_of(expand, pad(expand, "padding", "mode"))))
def fuse_branch(r, x, w, b, stored, layout, hs, Bs, scales, starts, h, s, B, padding, mode):
    """linear(x, w, b) + linear(h * s, B)  ->  adapted_linear(x, w, b, h, B, s)"""
    if stored is None:
        if example(w.node).requires_grad:
            r.note("not fused: its base weight is trained")
            return None
        stored, layout, hs, Bs, scales, starts = [w], "dense", [], [], [], []
    if not isinstance(s, (int, float, type(None))) or mode not in (None, "constant"):
        return None
    return torch.ops.rewrite.adapted_linear(
        x, list(stored), layout, b,
        [*hs, h], [*Bs, B], [*scales, 1.0 if s is None else float(s)], [*starts, padding[0] if padding else 0],
    )  # fmt: skip


FUSE = (fuse_storage, fuse_branch)
