"""Rows of a batch on different adapters, mixed and weighted as gates say, in one call whatever their ranks.

The adapters of a layer stand side by side: A (R, d_in) and B (d_out, R) of the summed rank R, and a gate (batch, R)
with the weight of every rank for every row of the batch, zero where an adapter takes no part.

- `rewrite::segmented_shrink(x, A, gate)`                            h = (x A') * gate
- `rewrite::segmented_linear(x, weight, layout, bias, h, B, gate)`   x W' + bias + h B'
- `rewrite::segmented_product(h, M, gate)`                           h M', without a base
- `rewrite::segmented_outer(h, x, gate)`                             h' x, the gradient of the factors

h counts as zero where its gate is zero, whatever it holds, and so has no gradient there.  What is zero is not computed:
kernels skip tiles of rows and ranks (`codegen.kernels.segmented`), a CPU takes the rows of every adapter.  Gates are
numbers of a step, not of a graph, and have no gradient.  Source of the two steps: Punica (Chen et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen import ops
from rewrite.codegen.tensors import autocast, autocast_dtype
from rewrite.codegen.workspace import register_workspace
from rewrite.errors import RewriteError

Tensor = torch.Tensor
Index = slice | Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_LINEAR = "Tensor x, Tensor[] weight, str layout, Tensor? bias, Tensor h, Tensor B, Tensor gate"
_lib.define("segmented_shrink(Tensor x, Tensor A, Tensor gate) -> Tensor")
_lib.define("segmented_shrink_core(Tensor x, Tensor A, Tensor gate) -> Tensor")
_lib.define(f"segmented_linear({_LINEAR}) -> Tensor")
_lib.define(f"segmented_linear_core({_LINEAR}) -> Tensor")
_lib.define("segmented_product(Tensor h, Tensor M, Tensor gate) -> Tensor")
_lib.define("segmented_outer(Tensor h, Tensor x, Tensor gate) -> Tensor")

_DENSE = 0.5
"""The part of (row, rank) pairs in use from which all of them in one product are faster than the rows of each."""


def segmented_shrink(x: Tensor, A: Tensor, gate: Tensor) -> Tensor:
    """`(x A') * gate`: x (batch, ..., d_in), A (R, d_in) and gate (batch, R), cast to x's dtype -> (batch, ..., R).

    >>> segmented_shrink(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([[6., 0.],
            [0., 3.]])
    """
    return torch.ops.rewrite.segmented_shrink_core(*_autocast(x, A), gate)


def segmented_product(h: Tensor, M: Tensor, gate: Tensor) -> Tensor:
    """`h M'` where the gate is not zero: h (batch, ..., R), M (n, R) cast to h's dtype -> (batch, ..., n)."""
    return F.linear(_within(h, gate), M.to(h.dtype))


def segmented_outer(h: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`h' x` over all rows where the gate is not zero: h (batch, ..., R), x (batch, ..., n) -> (R, n)."""
    return _within(h, gate).flatten(0, -2).t() @ x.flatten(0, -2)


def segmented_linear(
    x: Tensor, weight: Sequence[Tensor], layout: str, bias: Tensor | None, h: Tensor, B: Tensor, gate: Tensor
) -> Tensor:
    """`x W' + bias + h B'` where the gate is not zero.

    x (batch, ..., d_in); W = decode(weight, layout) (d_out, d_in), frozen; bias (d_out,) or None; h (batch, ..., R), as
    `segmented_shrink` makes it; B (d_out, R), cast to x's dtype; gate (batch, R).  Returns (batch, ..., d_out).
    """
    x, h, B = _autocast(x, h, B)
    weight = _autocast(*weight) if layout == "dense" else weight
    bias = None if bias is None else _autocast(bias)[0]
    return torch.ops.rewrite.segmented_linear_core(x, weight, layout, bias, h, B, gate)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype of products where autocast is on."""
    dtype = autocast_dtype(tensors[0])
    return [t if dtype is None else autocast(t, dtype) for t in tensors]


def _aligned(gate: Tensor, x: Tensor) -> Tensor:
    return gate.view(gate.shape[0], *(1,) * (x.ndim - 2), gate.shape[1])


def _row(x: Tensor) -> int:
    """Tokens in each row of the batch."""
    return x.shape[1:-1].numel()


def _within(h: Tensor, gate: Tensor) -> Tensor:
    return torch.where(_aligned(gate != 0, h), h, 0)


def _base(x, weight, layout, bias):
    return torch.ops.rewrite.adapted_linear_core(x, weight, layout, bias, [], [], [], [], [])


def _shrink(x, A, gate):
    return F.linear(x, A.to(x.dtype)) * _aligned(gate.to(x.dtype), x)


def _linear(x, weight, layout, bias, h, B, gate):
    y = _base(x, weight, layout, bias)
    y.view(-1, y.shape[-1]).addmm_(_within(h, gate).flatten(0, -2), B.to(x.dtype).t())
    return y


# --- a CPU: the rows of every adapter, found by the values of the gate ---


_LONG = 16
"""Tokens of a row from which a product for every run of rows costs less than a copy of the rows side by side."""


def segments(gate: Tensor, tokens: int = 1) -> list[tuple[slice, Index]]:
    """(ranks, rows) of every run of ranks that the same rows use; all in one where most pairs are in use.

    Rows are a slice where they are neighbours, as they always are where a row has many tokens.

    >>> segments(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(3, 4, None))]
    """
    used = gate != 0
    if not used.any():
        return []
    if used.sum() > _DENSE * used.numel():
        return [(slice(0, gate.shape[1]), slice(0, gate.shape[0]))]
    patterns, counts = used.unique_consecutive(dim=1, return_counts=True)
    found, start = list[tuple[slice, Index]](), 0
    for pattern, count in zip(patterns.t(), counts.tolist(), strict=True):
        rows = pattern.nonzero().flatten()
        if len(rows):
            found += [(slice(start, start + count), index) for index in _runs(rows, tokens)]
        start += count
    return found


def _runs(rows: Tensor, tokens: int) -> list[Index]:
    """Row numbers in order, as slices of neighbours; all in one tensor where that is several short ones."""
    cuts = (rows.diff() > 1).nonzero().flatten().add(1).tolist()
    if cuts and tokens < _LONG:
        return [rows]
    ends = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    return [slice(int(rows[a]), int(rows[b - 1]) + 1) for a, b in ends]


def _cpu_shrink(x, A, gate):
    A, gate = A.to(x.dtype), gate.to(x.dtype)
    h = x.new_zeros(*x.shape[:-1], A.shape[0])
    for ranks, rows in segments(gate, _row(x)):
        part = x[rows]
        h[rows, ..., ranks] = F.linear(part, A[ranks]) * _aligned(gate[rows, ranks], part)
    return h


def _cpu_add(y, h, M, gate):
    """Add `h M'` to y, in place."""
    for ranks, rows in segments(gate, _row(h)):
        part, factor = _within(h[rows, ..., ranks], gate[rows, ranks]).flatten(0, -2), M[:, ranks].t()
        if isinstance(rows, slice):
            y[rows].view(-1, y.shape[-1]).addmm_(part, factor)
        else:
            y.index_add_(0, rows, (part @ factor).view(len(rows), *y.shape[1:]))
    return y


def _cpu_product(h, M, gate):
    return _cpu_add(h.new_zeros(*h.shape[:-1], M.shape[0]), h, M.to(h.dtype), gate)


def _cpu_linear(x, weight, layout, bias, h, B, gate):
    return _cpu_add(_base(x, weight, layout, bias), h, B.to(x.dtype), gate)


def _cpu_outer(h, x, gate):
    out = x.new_zeros(h.shape[-1], x.shape[-1])
    for ranks, rows in segments(gate, _row(h)):
        part = _within(h[rows, ..., ranks], gate[rows, ranks])
        out[ranks].addmm_(part.flatten(0, -2).t(), x[rows].flatten(0, -2))
    return out


# --- a GPU: kernels that skip what is zero; the reference where they have a reason not to ---


def _cuda_shrink(x, A, gate):
    from rewrite.codegen.kernels import segmented as kernels

    A = A.to(x.dtype)
    return _shrink(x, A, gate) if kernels.reason(x, A, gate) else kernels.shrink(x, A, gate)


def _cuda_product(h, M, gate):
    from rewrite.codegen.kernels import segmented as kernels

    M = M.to(h.dtype)
    return segmented_product(h, M, gate) if kernels.reason(h, M, gate) else kernels.expand(None, h, M, gate)


def _cuda_linear(x, weight, layout, bias, h, B, gate):
    from rewrite.codegen.kernels import segmented as kernels

    B = B.to(x.dtype)
    if kernels.reason(h, B, gate):
        return _linear(x, weight, layout, bias, h, B, gate)
    return kernels.expand(_base(x, weight, layout, bias), h, B, gate)


def _cuda_outer(h, x, gate):
    from rewrite.codegen.kernels import segmented as kernels

    return segmented_outer(h, x, gate) if kernels.reason(h, x, gate) else kernels.outer(h, x, gate)


# --- gradients ---


def _fixed(gate: Tensor) -> None:
    if gate.requires_grad:
        raise RewriteError(
            "the gates of segmented operators have no gradient: leave gates that train to plain products"
        )


def _shrink_setup(ctx, inputs, output):
    x, A, gate = inputs
    _fixed(gate)
    ctx.save_for_backward(x, A, gate)


def _shrink_backward(ctx, dh):
    x, A, gate = ctx.saved_tensors
    need_x, need_A, _ = ctx.needs_input_grad
    du = dh * _aligned(gate.to(dh.dtype), dh)
    dx = torch.ops.rewrite.segmented_product(du, A.t(), gate) if need_x else None
    dA = torch.ops.rewrite.segmented_outer(du, x, gate).to(A.dtype) if need_A else None
    return dx, dA, None


def _linear_setup(ctx, inputs, output):
    _, weight, ctx.layout, _, h, B, gate = inputs
    _fixed(gate)
    if any(w.requires_grad for w in weight):
        raise RewriteError("segmented_linear has no gradient for its weight: the fuse pass must leave such a layer")
    ctx.save_for_backward(*weight, h, B, gate)


def _linear_backward(ctx, dy):
    *weight, h, B, gate = ctx.saved_tensors
    need_x, _, _, need_bias, need_h, need_B, _ = ctx.needs_input_grad
    dx = ops.input_gradient(dy, weight, ctx.layout) if need_x else None
    used = (gate != 0).to(dy.dtype)
    dh = torch.ops.rewrite.segmented_shrink_core(dy, B.t(), used) if need_h else None
    dB = torch.ops.rewrite.segmented_outer(h, dy, gate).t().to(B.dtype) if need_B else None
    return dx, [None] * len(weight), None, dy.flatten(0, -2).sum(0) if need_bias else None, dh, dB, None


def _fake_linear(x, weight, layout, bias, h, B, gate):
    return x.new_empty(*x.shape[:-1], B.shape[0])


_lib.impl("segmented_shrink", segmented_shrink, "CompositeImplicitAutograd")
_lib.impl("segmented_linear", segmented_linear, "CompositeImplicitAutograd")
for _name, _reference, _cpu, _cuda in (
    ("segmented_shrink_core", _shrink, _cpu_shrink, _cuda_shrink),
    ("segmented_linear_core", _linear, _cpu_linear, _cuda_linear),
    ("segmented_product", segmented_product, _cpu_product, _cuda_product),
    ("segmented_outer", segmented_outer, _cpu_outer, _cuda_outer),
):
    _lib.impl(_name, _reference, "CompositeExplicitAutograd")
    _lib.impl(_name, _cpu, "CPU")
    _lib.impl(_name, _cuda, "CUDA")
_fake, _autograd = torch.library.register_fake, torch.library.register_autograd
_fake("rewrite::segmented_shrink_core", lambda x, A, gate: x.new_empty(*x.shape[:-1], A.shape[0]), lib=_lib)
_fake("rewrite::segmented_product", lambda h, M, gate: h.new_empty(*h.shape[:-1], M.shape[0]), lib=_lib)
_fake("rewrite::segmented_outer", lambda h, x, gate: x.new_empty(h.shape[-1], x.shape[-1]), lib=_lib)
_fake("rewrite::segmented_linear_core", _fake_linear, lib=_lib)
_autograd("rewrite::segmented_shrink_core", _shrink_backward, setup_context=_shrink_setup, lib=_lib)
_autograd("rewrite::segmented_linear_core", _linear_backward, setup_context=_linear_setup, lib=_lib)


# Products are counted as if every row used every rank: how many do is known when a step runs.


@register_flop_formula(torch.ops.rewrite.segmented_shrink_core)
def _shrink_flops(x, A, gate, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(x).numel() * A[0]


@register_flop_formula(torch.ops.rewrite.segmented_product)
def _product_flops(h, M, gate, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(h).numel() * M[0]


@register_flop_formula(torch.ops.rewrite.segmented_outer)
def _outer_flops(h, x, gate, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(h).numel() * x[-1]


@register_flop_formula(torch.ops.rewrite.segmented_linear_core)
def _linear_flops(x, weight, layout, bias, h, B, gate, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(x[:-1]).numel() * B[0] * (x[-1] + B[1])


@register_workspace(torch.ops.rewrite.segmented_linear_core)
def _linear_workspace(x, weight, layout, *_: object) -> int:
    return ops.decoded_bytes(weight, layout, x.dtype)
