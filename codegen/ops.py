"""The fused operators that passes lower to, as `torch.library` ops: fake, autograd and reference.

- `rewrite::decode(stored, layout)`              the dense weight behind stored tensors; traced through
- `rewrite::adapted_linear(x, weight, ...)`      base + low-rank branches + bias + dequantisation, one op
- `rewrite::coarse_activation(x, name, ...)`     a nonlinearity that keeps its derivative in a few bits; traced through
- `rewrite::low_rank(x, A, B, scale)`            one branch whose parameters have another dtype than x, in eager

`adapted_linear` follows autocast and hands over to `adapted_linear_core`, which is opaque to AOTAutograd: it
accumulates each branch into the output of the base product in place, and never saves a weight that it decoded.
The bodies here are the references; a device's faster routes are in `rewrite.codegen.routes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

import rewrite.codegen.branches
import rewrite.codegen.weights  # noqa: F401  (they define rewrite::low_rank_gradients, low_rank_weight)
from rewrite.codegen import routes
from rewrite.codegen.activations import coarse_activation
from rewrite.codegen.below import define_below
from rewrite.codegen.costs import register_flops_of_results
from rewrite.codegen.kernels import linear
from rewrite.codegen.storage import layout as parse_layout
from rewrite.codegen.tensors import as_rows, autocast, autocast_dtype
from rewrite.codegen.workspace import register_workspace
from rewrite.errors import RewriteError

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "DEF")

_BRANCHES = "Tensor[] h, Tensor[] B, float[] scale, SymInt[] start, SymInt[] skip"
_lib.define("decode(Tensor[] stored, str layout) -> Tensor")
_lib.define(f"adapted_linear(Tensor x, Tensor[] weight, str layout, Tensor? bias, {_BRANCHES}=[]) -> Tensor")
_lib.define(f"adapted_linear_core(Tensor x, Tensor[] weight, str layout, Tensor? bias, {_BRANCHES}) -> Tensor")
_lib.define("low_rank(Tensor x, Tensor A, Tensor B, float scale) -> Tensor")
_lib.define("coarse_activation(Tensor x, str name, int bits, float parameter) -> Tensor")
_lib.define("linear_input_gradient(Tensor dy, Tensor[] weight, str layout) -> Tensor")
_lib.define("sliced_gradients(Tensor dy, Tensor W, Tensor h, Tensor B, SymInt start) -> (Tensor, Tensor)")


def decode(stored: Sequence[Tensor], layout: str) -> Tensor:
    """The dense weight, (d_out, d_in), behind stored tensors of `layout`."""
    return parse_layout(layout).decode(*stored)


def adapted_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: str,
    bias: Tensor | None,
    h: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    start: Sequence[int],
    skip: Sequence[int] = (),
) -> Tensor:
    """`y = x W' + b`, then `y[..., start : start + len(B)] += scale * h B'` for every branch.

    x (..., d_in); W = decode(weight, layout) (d_out, d_in), frozen; bias (d_out,) or None; per branch
    h (..., r), B (rows, r), its scale, and the output row where it starts.  `skip` = (start, stop) are columns of a
    dense W that x W' leaves out, since the first branch has them: its h is a copy of x[..., start:stop], its B
    (d_out, stop - start) stands in their place, and the gradient of x is that of all columns.  Returns (..., d_out).
    """
    if dtype := autocast_dtype(x):
        x, h, B = autocast(x, dtype), [autocast(t, dtype) for t in h], [autocast(t, dtype) for t in B]
        weight = [autocast(t, dtype) for t in weight] if layout == "dense" else weight
        bias = None if bias is None else autocast(bias, dtype)
    else:
        B = [t if t.dtype == x.dtype else t.to(x.dtype) for t in B]
    return torch.ops.rewrite.adapted_linear_core(x, weight, layout, bias, h, B, scale, start, skip)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`scale * B A x` for parameters of another dtype than x, which are cast to it: x (..., d_in) -> (..., d_out).

    For eager models: keeps x and the parameters for backward, no cast copy and no (..., r) product.
    """
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def _low_rank_setup(ctx, inputs, output):
    x, A, B, ctx.scale = inputs
    ctx.save_for_backward(x, A, B)


def _low_rank_backward(ctx, dy):
    x, A, B = ctx.saved_tensors
    low_A, low_B, rows = A.to(x.dtype), B.to(x.dtype), dy.flatten(0, -2)
    dh = (dy @ low_B) * ctx.scale
    h = F.linear(x, low_A) * ctx.scale
    dx = dh @ low_A if ctx.needs_input_grad[0] else None
    dA = (dh.flatten(0, -2).t() @ x.flatten(0, -2)).to(A.dtype)
    return dx, dA, (rows.t() @ h.flatten(0, -2)).to(B.dtype), None


def _core(x, weight, layout, bias, h, B, scale, start, skip):
    w = weight[0] if layout == "dense" else decode(weight, layout)
    w = w if w.dtype == x.dtype else w.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    # Not a view of a product: a model may go on to change the output in place, which autograd forbids for views.
    out = x.new_empty(*x.shape[:-1], w.shape[0])
    y = out.view(-1, w.shape[0])
    spans = _kept(skip, w.shape[1]) if skip else [(0, w.shape[1])]
    a = [*(rows[:, first:last] for first, last in spans), *map(as_rows, h)]
    b = [*(w[:, first:last].t() for first, last in spans), *(Bi.t() for Bi in B)]
    linear.Sum(a, b, [1.0] * len(spans) + list(scale), [0] * len(spans) + list(start), bias).accumulated(y)
    return out


def routed_core(x, weight, layout, *rest):
    """The product by a route of the device: of the stored weight, or else of the decoded one."""
    bias, h, B, scale, start, skip = rest
    if skip and x.is_cuda and 0 < skip[0] and skip[1] < x.shape[-1]:
        # Two parts of W are two products, and one more pass over the output than the whole W and a difference.
        whole = [B[0] - weight[0][:, skip[0] : skip[1]].to(B[0].dtype), *B[1:]]
        return routed_core(x, weight, layout, bias, h, whole, scale, start, [])
    if (found := routes.product(x, weight, layout, *rest)) is not None:
        return found
    if layout != "dense":
        return routed_core(x, [decode(weight, layout).to(x.dtype)], "dense", *rest)
    return _core(x, weight, layout, *rest)


def _kept(skip: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """What is left of that many columns without those that are skipped, as slices; one at least."""
    return [(a, b) for a, b in ((0, skip[0]), (skip[1], columns)) if a < b] or [(0, 0)]


def decoded_rows(weight: Sequence[Tensor], layout: str) -> int:
    """d_out of the dense weight behind stored tensors of `layout`."""
    return weight[0].shape[0] if layout == "dense" else parse_layout(layout).shape[0]  # type: ignore[attr-defined]


def _core_fake(x, weight, layout, bias, h, B, scale, start, skip):
    return x.new_empty(*x.shape[:-1], decoded_rows(weight, layout))


def _core_setup(ctx, inputs, output):
    _, weight, layout, _, h, B, scale, start, skip = inputs
    if any(w.requires_grad for w in weight):
        raise RewriteError("adapted_linear has no gradient for its weight: the fuse pass must leave such a layer")
    ctx.save_for_backward(*weight, *h, *B)
    ctx.sizes = len(weight), len(h)
    ctx.layout, ctx.scale, ctx.start, ctx.skip = layout, scale, start, skip


def _core_backward(ctx, dy):
    weights, branches = ctx.sizes
    saved = ctx.saved_tensors
    weight, h, B = saved[:weights], saved[weights : weights + branches], saved[weights + branches :]
    need_x, _, _, need_bias, need_h, need_B, *_ = ctx.needs_input_grad
    dbias = dy.flatten(0, -2).sum(0) if need_bias else None
    dx: Tensor | None = None
    dh: list[Tensor | None] = []
    dB: list[Tensor | None] = []
    if need_x and ctx.skip:  # the gradient of the first h is in that of x
        dx, first = torch.ops.rewrite.sliced_gradients(dy, weight[0], h[0], B[0], ctx.skip[0])
        dh, dB = [None], [first]
    elif need_x:
        dx = input_gradient(dy, weight, ctx.layout)
    branch = zip(h, B, ctx.scale, ctx.start, strict=True)
    for hi, Bi, si, at in itertools.islice(branch, len(dB), None):
        part = dy if Bi.shape[0] == dy.shape[-1] else dy[..., at : at + Bi.shape[0]]
        low, high = _branch_gradients(part, hi, Bi, si, any(_flat(need_h)), any(_flat(need_B)))
        dh.append(low)
        dB.append(high)
    # autograd takes an empty list of numbers for one of tensors
    rest, skipped = (None if numbers else [] for numbers in (branches, ctx.skip))
    return dx, [None] * weights, None, dbias, dh, dB, rest, rest, skipped


def _branch_gradients(dy, h, B, scale, need_h, need_B):
    if need_h and need_B:
        return torch.ops.rewrite.low_rank_gradients(dy, h, B, scale)
    # Scaled after the product: `B * s` and `h * s` would depend on the forward alone, and be saved for it.
    dh = _scaled(dy @ B, scale) if need_h else None
    return dh, _scaled(torch.ops.rewrite.factor_gradient(dy, h), scale) if need_B else None


def _scaled(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1.0 else t * scale


def _flat(needs: object) -> list[bool]:
    return list(needs) if isinstance(needs, (list, tuple)) else [bool(needs)]


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor:
    """`dy W`, (..., d_in), of a frozen layer: dy (..., d_out)."""
    if layout == "dense":  # an ordinary product: Inductor may fuse around it
        return torch.matmul(dy, weight[0])
    return torch.ops.rewrite.linear_input_gradient(dy, weight, layout)


def _input_gradient_core(dy, weight, layout):
    w = decode(weight, layout).to(dy.dtype)
    return torch.mm(dy.reshape(-1, dy.shape[-1]), w).view(*dy.shape[:-1], w.shape[1])


def _sliced_gradients(dy, W, h, B, start):
    """dx and dB of a layer whose columns from `start` on are B: every product goes to its place in dx."""
    rows, W = dy.reshape(-1, dy.shape[-1]), W.to(dy.dtype)
    dx = dy.new_empty(*dy.shape[:-1], W.shape[1])
    flat, stop = dx.view(-1, W.shape[1]), start + B.shape[1]
    for first, last in _kept((start, stop), W.shape[1]):
        torch.mm(rows, W[:, first:last], out=flat[:, first:last])
    dh, dB = torch.ops.rewrite.low_rank_gradients(dy, h, B, 1.0)
    dx[..., start:stop] = dh
    return dx, dB


def routed_input_gradient(dy, weight, layout):
    found = routes.input_gradient(dy, weight, layout)
    return _input_gradient_core(dy, weight, layout) if found is None else found


def _input_gradient_fake(dy, weight, layout):
    return dy.new_empty(*dy.shape[:-1], parse_layout(layout).shape[1])  # type: ignore[attr-defined]


_lib.impl("decode", decode, "CompositeImplicitAutograd")
_lib.impl("coarse_activation", coarse_activation, "CompositeImplicitAutograd")
_lib.impl("adapted_linear", adapted_linear, "CompositeImplicitAutograd")
_lib.impl("low_rank", low_rank, "CompositeExplicitAutograd")
_lib.impl("adapted_linear_core", _core, "CompositeExplicitAutograd")
_lib.impl("linear_input_gradient", _input_gradient_core, "CompositeExplicitAutograd")
_lib.impl("sliced_gradients", _sliced_gradients, "CompositeExplicitAutograd")
for _device in ("CPU", "CUDA"):
    _lib.impl("adapted_linear_core", routed_core, _device)
    _lib.impl("linear_input_gradient", routed_input_gradient, _device)
torch.library.register_fake(
    "rewrite::low_rank", lambda x, A, B, scale: x.new_empty(*x.shape[:-1], B.shape[0]), lib=_lib
)
torch.library.register_autograd("rewrite::low_rank", _low_rank_backward, setup_context=_low_rank_setup, lib=_lib)
torch.library.register_fake("rewrite::adapted_linear_core", _core_fake, lib=_lib)
torch.library.register_fake("rewrite::linear_input_gradient", _input_gradient_fake, lib=_lib)
torch.library.register_fake(
    "rewrite::sliced_gradients",
    lambda dy, W, h, B, start: (dy.new_empty(*dy.shape[:-1], W.shape[1]), torch.empty_like(B)),
    lib=_lib,
)
torch.library.register_autograd("rewrite::adapted_linear_core", _core_backward, setup_context=_core_setup, lib=_lib)
_routed = {"CompositeExplicitAutograd": _core, "CPU": routed_core, "CUDA": routed_core}
define_below(_lib, torch.ops.rewrite.adapted_linear_core.default, _core_fake, **_routed)


@register_flop_formula(torch.ops.rewrite.adapted_linear_core)
def _core_flops(x, weight, layout, bias, h, B, scale, start, skip, *, out_shape=None, **_) -> int:
    tokens, rows = torch.Size(x[:-1]).numel(), out_shape[-1] if out_shape else 0
    columns = x[-1] - (skip[1] - skip[0] if skip else 0)
    return 2 * tokens * (columns * rows + sum(hi[-1] * Bi[0] for hi, Bi in zip(h, B, strict=True)))


@register_flop_formula(torch.ops.rewrite.linear_input_gradient)
def _input_gradient_flops(dy, weight, layout, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(dy).numel() * (out_shape[-1] if out_shape else 0)


@register_flops_of_results(torch.ops.rewrite.sliced_gradients)
def _sliced_flops(dy, W, h, B, start) -> tuple[int, int]:
    values = torch.Size(dy).numel()
    return 2 * values * W[1], 2 * values * B[1]


@register_workspace(torch.ops.rewrite.adapted_linear_core)
def _core_workspace(x, weight, layout, *_: object) -> int:
    return decoded_bytes(weight, layout, x.dtype)


@register_workspace(torch.ops.rewrite.linear_input_gradient)
def _input_gradient_workspace(dy, weight, layout) -> int:
    return decoded_bytes(weight, layout, dy.dtype)


def decoded_bytes(weight: Sequence[Tensor], layout: str, dtype: torch.dtype) -> int:
    """Bytes of a stored weight while it is decoded for a product; routes that do not form it take no more."""
    return 0 if layout == "dense" else torch.Size(parse_layout(layout).shape).numel() * dtype.itemsize  # type: ignore[attr-defined]
