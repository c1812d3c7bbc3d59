"""A low-rank branch and a scale of every output, after a base product: DoRA's magnitudes, IA3's factors.

- `rewrite::scaled_branch(y, h, B, scale, d)`                       `(y + s h B') * d` in one pass over y
- `rewrite::scaled_branch_gradients(dy, out, h, B, scale, d)`       all its gradients from one read of dy and of out

What is kept for backward is the result: it may be kept for what follows as well, and `v = out / d` is as exact as a v
that was rounded to be kept.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.below import define_below
from rewrite.codegen.branches import low_rank_gradients
from rewrite.codegen.costs import register_flops_of_results
from rewrite.codegen.kernels import gradients, linear
from rewrite.codegen.kernels.products import TINY
from rewrite.codegen.kernels.target import unusable
from rewrite.codegen.tensors import as_rows, wide_dtype

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("scaled_branch(Tensor y, Tensor h, Tensor B, float scale, Tensor d) -> Tensor")
_lib.define(
    "scaled_branch_gradients(Tensor dy, Tensor out, Tensor h, Tensor B, float scale, Tensor d)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def apart(y: Tensor, h: Tensor, B: Tensor, d: Tensor, start: int = 0) -> str | None:
    """Why `(y + h B') * d` should be a sum and a multiplication, or None: y (..., N) on a GPU, B from row `start` on.

    Counted: the pass that adds the branch reads and writes y anyhow, and a multiplication apart costs nothing only
    where a compiler fuses it with what follows; so forward decides nothing, backward does.
    """
    if reason := unusable(y.device):
        return reason
    if y.dtype != torch.bfloat16 or d.dtype != y.dtype:  # in float16 the quotient out / d may underflow
        return f"outputs of {y.dtype} and a scale of {d.dtype}, not both of bfloat16"
    if start != 0 or B.shape[0] != y.shape[-1]:
        return "its branch has a part of the outputs"
    return gradients.too_wide(y.shape[-1], h.shape[-1], y.dtype)


def divisible(d: Tensor) -> Tensor:
    """d with what is smaller than `TINY` replaced by it: `out / d` is v wherever d is 0 too."""
    return torch.where(d.abs() < TINY, TINY, d)


def _branch(y: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> Tensor:
    """y (..., N), h (..., r), B (N, r), d (N,) -> (..., N)."""
    return torch.addmm(as_rows(y), as_rows(h), B.t(), alpha=scale).mul_(divisible(d)).view(y.shape)


def _branch_cuda(y: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> Tensor:
    total = linear.Sum([as_rows(h)], [B.t()], [scale], [0], given=as_rows(y), factor=d)
    if total.supports() is not None:
        return _branch(y, h, B, scale, d)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    total.fused(out.view(total.M, total.N))
    return out


def _gradients(
    dy: Tensor, out: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, h, B and d in `scaled_branch`, from its result: dy and out (..., N)."""
    rows, d = as_rows(dy), divisible(d)
    wide = wide_dtype(d.dtype)
    dd = (rows.to(wide) * as_rows(out).to(wide)).sum(0) / d
    scaled = rows * d
    dh, dB = low_rank_gradients(scaled, h, B, scale)
    return scaled.view(dy.shape), dh, dB, dd.to(d.dtype)


def _gradients_cuda(dy, out, h, B, scale, d):
    rows, low, kept = as_rows(dy), as_rows(h), as_rows(out)
    if gradients.unscaled(rows, low, B, kept, d) is not None:
        return _gradients(dy, out, h, B, scale, d)
    scaled, dh, dB, dd = gradients.scaled_gradients(rows, kept, low, B, scale, d)
    return scaled.view(dy.shape), dh.view(h.shape), dB, dd


def _setup(ctx, inputs, output):
    _, h, B, ctx.scale, d = inputs
    ctx.save_for_backward(output, h, B, d)


def _backward(ctx, dy):
    out, h, B, d = ctx.saved_tensors
    y, dh, dB, dd = torch.ops.rewrite.scaled_branch_gradients(dy, out, h, B, ctx.scale, d)
    return y, dh, dB, None, dd


def _branch_fake(y, h, B, scale, d):
    return y.new_empty(y.shape)


def _gradients_fake(dy, out, h, B, scale, d):
    return dy.new_empty(dy.shape), dy.new_empty(h.shape), dy.new_empty(B.shape), dy.new_empty(d.shape)


_lib.impl("scaled_branch", _branch, "CompositeExplicitAutograd")
_lib.impl("scaled_branch", _branch_cuda, "CUDA")
_lib.impl("scaled_branch_gradients", _gradients, "CompositeExplicitAutograd")
_lib.impl("scaled_branch_gradients", _gradients_cuda, "CUDA")
torch.library.register_fake("rewrite::scaled_branch", _branch_fake, lib=_lib)
torch.library.register_fake("rewrite::scaled_branch_gradients", _gradients_fake, lib=_lib)
torch.library.register_autograd("rewrite::scaled_branch", _backward, setup_context=_setup, lib=_lib)
define_below(
    _lib, torch.ops.rewrite.scaled_branch.default, _branch_fake, CompositeExplicitAutograd=_branch, CUDA=_branch_cuda
)


@register_flop_formula(torch.ops.rewrite.scaled_branch)
def _branch_flops(y, h, B, scale, d, **_) -> int:
    return 2 * torch.Size(y).numel() * B[1]


@register_flops_of_results(torch.ops.rewrite.scaled_branch_gradients)
def _gradients_flops(dy, out, h, B, scale, d) -> tuple[int, ...]:
    product = 2 * torch.Size(dy).numel() * B[1]
    return 0, product, product, 0
