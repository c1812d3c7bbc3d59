"""Low-rank branches of a product: added to it in place, and operators of their gradients in backward graphs.

- `rewrite::low_rank_gradients(dy, h, B, scale)`   the gradients of `scale * h B'`, both from one read of dy
- `rewrite::sum_of_products(a, b, ...)`            `a_0 b_0 + a_1 b_1 + ...`, summed in place: an input's gradient
- `rewrite::factor_gradient(dy, h)`                that of B alone, where h has none: a slice of a frozen layer's input
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.below import define_below
from rewrite.codegen.costs import register_flops_of_results
from rewrite.codegen.cpu import operators
from rewrite.codegen.dropout import add_input_gradient
from rewrite.codegen.kernels import gradients, linear, outer_product
from rewrite.codegen.tensors import as_rows

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("low_rank_gradients(Tensor dy, Tensor h, Tensor B, float scale) -> (Tensor, Tensor)")
_lib.define(
    "sum_of_products(Tensor[] a, Tensor[] b, Tensor? dh=None, Tensor? A=None, Tensor? seed=None, int[] ranks=[],"
    " float[] p=[]) -> Tensor"
)
_lib.define("factor_gradient(Tensor dy, Tensor h) -> Tensor")


def low_rank_gradients(dy: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(scale * dy B, scale * dy' h)`: dy (..., N), h (..., r), B (N, r) -> (..., r), (N, r)."""
    if cpu := operators.serving(dy, h, B):
        return cpu.low_rank_gradients(dy, h, B, scale)
    rows, low = as_rows(dy), as_rows(h)
    # Products with a factor: what they would be added to counts nothing.
    dh = torch.addmm(low, rows, B, beta=0, alpha=scale)
    return dh.view(h.shape), torch.addmm(B, rows.t(), low, beta=0, alpha=scale)


def _gradients_cuda(dy: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, low = as_rows(dy), as_rows(h)
    if gradients.supports(rows, low, B) is not None:
        return low_rank_gradients(dy, h, B, scale)
    dh, dB = gradients.low_rank_gradients(rows, low, B, scale)
    return dh.view(h.shape), dB


def factor_gradient(dy: Tensor, h: Tensor) -> Tensor:
    """`dy' h` over all rows: dy (..., N), h (..., r) -> (N, r)."""
    return as_rows(dy).t() @ as_rows(h)


def _factor_cuda(dy: Tensor, h: Tensor) -> Tensor:
    rows, low = as_rows(dy), as_rows(h)
    kernel = outer_product.of_slice(rows, low)
    return factor_gradient(dy, h) if isinstance(kernel, str) else kernel.compute(low, rows)


def _gradients_setup(ctx, inputs, output):
    dy, h, B, ctx.scale = inputs
    ctx.save_for_backward(dy, h, B)


def _gradients_backward(ctx, ddh, ddB):
    dy, h, B = ctx.saved_tensors
    for_dy = (ddh @ B.t() + h @ ddB.t()) * ctx.scale
    return for_dy, (dy @ ddB) * ctx.scale, (as_rows(dy).t() @ as_rows(ddh)) * ctx.scale, None


def sum_of_products(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    dh: Tensor | None = None,
    A: Tensor | None = None,
    seed: Tensor | None = None,
    ranks: Sequence[int] = (),
    p: Sequence[float] = (),
) -> Tensor:
    """`a_0 b_0 + a_1 b_1 + ...`, each added to the sum in place: a_i (M, k_i), b_i (k_i, N) -> (M, N).

    With dh (..., sum of ranks), A, seed, ranks and p also the gradient of x in `dropped_linear(x, A, seed, ranks, p)`.
    """
    if cpu := operators.serving(*a, *b):
        return cpu.sum_of_products(a, b, dh, A, seed, ranks, p)
    out = a[0].new_empty(a[0].shape[0], b[0].shape[1])
    total = linear.Sum(a, b, [1.0] * len(a), [0] * len(a))
    if out.is_cuda:
        linear.into(out, total)
    else:
        total.accumulated(out)
    if dh is not None and A is not None and seed is not None:
        add_input_gradient(out, as_rows(dh), A, seed, ranks, p)
    return out


_lib.impl("low_rank_gradients", low_rank_gradients, "CompositeExplicitAutograd")
_lib.impl("low_rank_gradients", _gradients_cuda, "CUDA")
_lib.impl("sum_of_products", sum_of_products, "CompositeExplicitAutograd")
_lib.impl("factor_gradient", factor_gradient, "CompositeExplicitAutograd")
_lib.impl("factor_gradient", _factor_cuda, "CUDA")
torch.library.register_fake("rewrite::factor_gradient", lambda dy, h: dy.new_empty(dy.shape[-1], h.shape[-1]), lib=_lib)


@torch.library.register_fake("rewrite::low_rank_gradients", lib=_lib)
def _gradients_fake(dy, h, B, scale):
    return dy.new_empty(h.shape), dy.new_empty(B.shape)


@torch.library.register_fake("rewrite::sum_of_products", lib=_lib)
def _sum_fake(a, b, dh=None, A=None, seed=None, ranks=(), p=()):
    return a[0].new_empty(a[0].shape[0], b[0].shape[1])


torch.library.register_autograd(
    "rewrite::low_rank_gradients", _gradients_backward, setup_context=_gradients_setup, lib=_lib
)
define_below(
    _lib,
    torch.ops.rewrite.low_rank_gradients.default,
    _gradients_fake,
    CompositeExplicitAutograd=low_rank_gradients,
    CUDA=_gradients_cuda,
)


@register_flops_of_results(torch.ops.rewrite.low_rank_gradients)
def _gradients_flops(dy, h, B, scale) -> tuple[int, int]:
    return (2 * torch.Size(dy).numel() * B[1],) * 2


@register_flop_formula(torch.ops.rewrite.sum_of_products)
def _sum_flops(a, b, dh=None, A=None, *_, **__) -> int:
    pairs = [*zip(a, b, strict=True), *([(dh, A)] if dh is not None else [])]
    return sum(2 * torch.Size(ai).numel() * bi[1] for ai, bi in pairs)


@register_flop_formula(torch.ops.rewrite.factor_gradient)
def _factor_flops(dy, h, **_) -> int:
    return 2 * torch.Size(dy).numel() * h[-1]
