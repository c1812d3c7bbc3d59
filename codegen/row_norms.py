"""`rewrite::adapted_row_norms(weight, layout, A, B, scale)`: row norms of W + s B A, which is never formed.

What DoRA divides by, at every step (Liu et al. 2024, arXiv 2402.09353).  |W|^2, which does not change, is not kept: W
is read for its product with A' anyhow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.cpu import operators
from rewrite.codegen.storage import layout as parse_layout
from rewrite.codegen.tensors import no_autocast, wide_dtype
from rewrite.codegen.workspace import register_workspace

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("adapted_row_norms(Tensor[] weight, str layout, Tensor A, Tensor B, float scale) -> Tensor")


def adapted_row_norms(weight: Sequence[Tensor], layout: str, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`|W + scale * B A|` row by row, as `|W|^2 + 2 s <W A', B> + s^2 <B (A A'), B>` under a root.

    W = decode(weight, layout) (d_out, d_in); A (r, d_in) and B (d_out, r), cast to W's dtype as its product does.
    Returns (d_out,), in float32 at least.

    >>> adapted_row_norms([torch.eye(2)], "dense", torch.ones(1, 2), torch.tensor([[0.0], [3.0]]), 1.0)
    tensor([1., 5.])
    """
    if operators.norms_serve(weight, layout, A, B) and (cpu := operators.serving(*weight, A, B)):
        return cpu.adapted_row_norms(weight, layout, A, B, scale)
    W = parse_layout(layout).decode(*weight)
    wide = wide_dtype(W.dtype)
    low, A, B = A.to(W.dtype), A.to(W.dtype).to(wide), B.to(W.dtype).to(wide) * scale
    squares = torch.linalg.vector_norm(W, dim=-1, dtype=wide).square()
    with no_autocast(W):
        update = 2 * (W @ low.t()).to(wide) + B @ (A @ A.t())
    return (squares + (update * B).sum(-1)).clamp(min=0).sqrt()


def _cuda(weight, layout, A, B, scale):
    from rewrite.codegen.kernels import row_norms

    kernel = row_norms.kernel_of(weight, layout, A, scale)
    if isinstance(kernel, str) and layout != "dense":  # decoded whole, its norms may have one
        weight, layout = [parse_layout(layout).decode(*weight)], "dense"
        kernel = row_norms.kernel_of(weight, layout, A, scale)
    if isinstance(kernel, str):
        return adapted_row_norms(weight, layout, A, B, scale)
    return row_norms.row_norms(kernel, weight, A, B)


def _fake(weight, layout, A, B, scale):
    dtype = weight[0].dtype if layout == "dense" else parse_layout(layout).dtype  # type: ignore[attr-defined]
    return B.new_empty(B.shape[0], dtype=wide_dtype(dtype))


def _setup(ctx, inputs, output):
    weight, ctx.layout, A, B, ctx.scale = inputs
    ctx.save_for_backward(*weight, A, B, output)


def _backward(ctx, dn):
    """d|v| = <v, dv> / |v|: with c = dn / |v|, the factors see V = W + s B A from either side."""
    *weight, A, B, norms = ctx.saved_tensors
    W = parse_layout(ctx.layout).decode(*weight)
    wide = norms.dtype
    low_A, low_B = A.to(W.dtype), B.to(W.dtype)
    wide_A, wide_B = low_A.to(wide), low_B.to(wide) * ctx.scale
    c = torch.where(norms > 0, dn / norms, 0.0)[:, None] * ctx.scale
    weighted = c * low_B.to(wide)
    with no_autocast(W):
        dB = c * ((W @ low_A.t()).to(wide) + wide_B @ (wide_A @ wide_A.t()))
        dA = (weighted.to(W.dtype).t() @ W).to(wide) + (weighted.t() @ wide_B) @ wide_A
    return [None] * len(weight), None, dA.to(A.dtype), dB.to(B.dtype), None


_lib.impl("adapted_row_norms", adapted_row_norms, "CompositeExplicitAutograd")
_lib.impl("adapted_row_norms", _cuda, "CUDA")
torch.library.register_fake("rewrite::adapted_row_norms", _fake, lib=_lib)
torch.library.register_autograd("rewrite::adapted_row_norms", _backward, setup_context=_setup, lib=_lib)


@register_flop_formula(torch.ops.rewrite.adapted_row_norms)
def _flops(weight, layout, A, B, scale, *, out_shape=None, **_) -> int:
    return 2 * A[0] * (A[1] * (B[0] + A[0]) + B[0] * A[0])


@register_workspace(torch.ops.rewrite.adapted_row_norms)
def _workspace(weight, layout, *_: object) -> int:
    if layout == "dense":
        return 0
    known = parse_layout(layout)
    return torch.Size(known.shape).numel() * known.dtype.itemsize  # type: ignore[attr-defined]
