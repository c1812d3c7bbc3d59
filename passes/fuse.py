"""fuse: base product + adapter branches + bias + dequantisation become one operator; a slice of a weight that trains
is taken out of the base product; a scale of the outputs joins the branch.

A layer whose base weight trains is left alone: the fused operator has no gradient for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewrite.codegen import scaled
from rewrite.passes.builder import example
from rewrite.passes.operators import (
    adapted_linear,
    adapted_row_norms,
    add,
    clone,
    decode,
    inserted,
    linear,
    mul,
    narrow,
    pad,
    to,
)
from rewrite.passes.pattern import any_of
from rewrite.passes.rule import rule

expand = linear(any_of(mul("h", "s"), "h"), "B")
branch = any_of(expand, pad(expand, "padding", "mode"))
base = any_of(linear("x", "w", "b"), adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts"))


@rule(adapted_row_norms("weight", "layout", "A", "B", "scale"))
def fuse_norms(r: Any, weight: Any, layout: Any, A: Any, B: Any, scale: Any) -> Any:
    """adapted_row_norms([decode(stored)], A, B, s)  ->  adapted_row_norms(stored, A, B, s)"""
    decoded = decode.arguments(weight[0].node) if layout == "dense" else None
    return decoded and torch.ops.rewrite.adapted_row_norms(r.proxy(decoded[0]), decoded[1], A, B, scale)


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
    """A branch, or a shift."""
    return mode in (None, "constant") if c is None else _of_outputs(c, example(y))


def _of_outputs(c: Any, y: torch.Tensor) -> bool:
    """One value per output, the same for every row."""
    return isinstance(c, fx.Proxy) and tuple(example(c.node).shape) == tuple(y.shape[-1:])


@rule(adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts"))
def fuse_columns(r, x, stored, layout, b, hs, Bs, scales, starts) -> Any:
    """adapted_linear(x, w, b, x[:, s], D)  ->  adapted_linear(x[:, rest], w[:, rest], b, x[:, s], w[:, s] + D)"""
    for i, h in enumerate(hs if layout == "dense" else ()):
        span = _slice(h.node, x.node)
        if span is None or Bs[i].shape[0] != stored[0].shape[0] or scales[i] != 1.0:
            continue
        start, stop = span
        if stop - start == x.shape[-1]:
            continue
        D = to.arguments(Bs[i].node)
        D = r.proxy(D[0]) if D is not None and isinstance(D[0], fx.Node) else Bs[i]
        part = stored[0].narrow(1, start, stop - start)
        part = part if part.dtype == D.dtype else part.to(D.dtype)
        sum_ = part + D
        sum_ = sum_ if sum_.dtype == x.dtype else sum_.to(x.dtype)
        hs, Bs, scales, starts = ([each[i], *each[:i], *each[i + 1 :]] for each in (hs, Bs, scales, starts))
        return torch.ops.rewrite.adapted_linear(
            x, stored, "dense", b, hs, [sum_, *Bs[1:]], scales, starts, [start, stop]
        )
    return None


def _slice(h: fx.Node, x: fx.Node) -> tuple[int, int] | None:
    """The columns [start, stop) of x that a node is a copy of; None where it is no such copy."""
    copied = clone.arguments(h)
    part = narrow.arguments(copied[0]) if copied else None
    if part is None or part[0] is not x or part[1] != -1:
        return None
    return part[2], part[2] + part[3]


EPILOGUES = frozenset({"cuda"})
"""Devices that scale outputs where they add a branch; on a CPU, Inductor multiplies along with what follows."""


fused = adapted_linear("x", "stored", "layout", "b", "hs", "Bs", "scales", "starts")


@rule(mul(any_of(fused, add("y", expand)), "d"))
def fuse_scale(r, x, stored, layout, b, hs, Bs, scales, starts, y, h, s, B, d) -> Any:
    """adapted_linear(x, w, b, h, B, s) * d  ->  scaled_branch(adapted_linear(x, w, b), h, B, s, d)"""
    out = example(r.origin)
    if out.device.type not in EPILOGUES or not inserted(r.origin) or not _of_outputs(d, out):
        return None
    if y is not None:  # something else reads the base product, too
        h, s = (h * s, 1.0) if isinstance(s, fx.Proxy) else (h, 1.0 if s is None else float(s))
        branches = [(h, B, s, 0)]
    elif not (branches := list(zip(hs, Bs, scales, starts, strict=True))):
        return None
    factors = example(d.node)
    reasons = [scaled.apart(out, example(h.node), example(B.node), factors, start) for h, B, _, start in branches]
    if None not in reasons:
        r.note(f"its scale is not fused: {reasons[-1]}")
        return None
    h, B, scale, _ = branches.pop(reasons.index(None))
    if y is None:
        rest = [list(column) for column in zip(*branches, strict=True)] or [[], [], [], []]
        y = torch.ops.rewrite.adapted_linear(x, stored, layout, b, *rest)
    h, B = (t if t.dtype == y.dtype else t.to(y.dtype) for t in (h, B))
    return torch.ops.rewrite.scaled_branch(y, h, B, scale, d)


FUSE = (fuse_norms, fuse_storage, fuse_branch, fuse_columns)
