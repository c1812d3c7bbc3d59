"""Low-rank branches of a product: added to it in place, and the operator of their gradients in backward graphs.

- `rewrite::low_rank_gradients(dy, h, B, scale)`   the gradients of `scale * h B'`, both from one read of dy
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.kernels import gradients

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("low_rank_gradients(Tensor dy, Tensor h, Tensor B, float scale) -> (Tensor, Tensor)")


def add_branches(
    y: Tensor, h: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float], start: Sequence[int]
) -> None:
    """`y[:, start : start + len(B)] += scale * h B'` for every branch: y (M, N), h (..., r), B (rows, r)."""
    for hi, Bi, si, at in zip(h, B, scale, start, strict=True):
        part = y if Bi.shape[0] == y.shape[1] else y[:, at : at + Bi.shape[0]]
        part.addmm_(hi.reshape(-1, hi.shape[-1]), Bi.t(), alpha=si)


def _gradients(dy: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(scale * dy B, scale * dy' h)`: dy (..., N), h (..., r), B (N, r) -> (..., r), (N, r)."""
    rows, low = _rows(dy), _rows(h)
    dh, dB = rows @ B, rows.t() @ low
    if scale != 1.0:
        dh *= scale
        dB *= scale
    return dh.view(h.shape), dB


def _gradients_cuda(dy: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, low = _rows(dy), _rows(h)
    if gradients.supports(rows, low, B) is not None:
        return _gradients(dy, h, B, scale)
    dh, dB = gradients.low_rank_gradients(rows, low, B, scale)
    return dh.view(h.shape), dB


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _gradients_setup(ctx, inputs, output):
    dy, h, B, ctx.scale = inputs
    ctx.save_for_backward(dy, h, B)


def _gradients_backward(ctx, ddh, ddB):
    dy, h, B = ctx.saved_tensors
    for_dy = (ddh @ B.t() + h @ ddB.t()) * ctx.scale
    return for_dy, (dy @ ddB) * ctx.scale, (_rows(dy).t() @ _rows(ddh)) * ctx.scale, None


_lib.impl("low_rank_gradients", _gradients, "CompositeExplicitAutograd")
_lib.impl("low_rank_gradients", _gradients_cuda, "CUDA")


@torch.library.register_fake("rewrite::low_rank_gradients", lib=_lib)
def _gradients_fake(dy, h, B, scale):
    return dy.new_empty(h.shape), dy.new_empty(B.shape)


torch.library.register_autograd(
    "rewrite::low_rank_gradients", _gradients_backward, setup_context=_gradients_setup, lib=_lib
)


@register_flop_formula(torch.ops.rewrite.low_rank_gradients)
def _gradients_flops(dy, h, B, scale, **_) -> int:
    return 4 * torch.Size(dy).numel() * B[1]
