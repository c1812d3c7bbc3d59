"""canonical: one spelling for the layers that models write in several, so that later rules need one pattern."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from rewrite.passes.builder import example
from rewrite.passes.operators import addmm, transpose
from rewrite.passes.pattern import Op
from rewrite.passes.rule import rule

view = Op("view", ("input", "size"), methods=("view",))
flat = Op("view", ("input", "rows", "columns"), methods=("view",))


@rule(transpose(transpose("w")))
def double_transpose(r: Any, w: Any) -> Any:
    """t(t(w))  ->  w"""
    return w


# The sizes of a view are symbolic more often than not: the body compares the shapes instead.
@rule(view(addmm("b", flat("x", -1, "columns"), "w"), "size"))
def conv1d(r: Any, b: Any, x: Any, columns: Any, w: Any, size: Any) -> Any:
    """view(addmm(b, view(x, -1, d_in), w), size)  ->  linear(x, t(w), b)"""
    out = r.origin.meta["example_value"].shape
    if out[:-1] != x.shape[:-1] or example(w.node).ndim != 2 or out[-1] != w.shape[1]:
        return None
    return F.linear(x, w.t(), b)


CANONICAL = (conv1d, double_transpose)
