"""A low-rank branch and a scale of every output, after a base product: DoRA's magnitudes, IA3's factors.

- `rewrite::scaled_linear(x, weight, layout, h, B, scale, start, d)`   `(x W' + s h B') * d`; traced through
- `rewrite::scaled_branch(y, h, B, scale, d)`                          `(y + s h B') * d` in one pass over y
- `rewrite::scaled_branch_gradients(dy, out, h, B, scale, d)`          all its gradients from one read of dy and out

Elsewhere than on a GPU, and for other dtypes and branches, `scaled_linear` is `adapted_linear(...) * d`, whose
multiplication a compiler fuses with what follows.  What is kept for backward is the result: it may be kept for what
follows as well, and `v = out / d` is as exact as v itself would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.below import define_below
from rewrite.codegen.costs import register_flops_of_results
from rewrite.codegen.kernels import gradients, linear
from rewrite.codegen.kernels.products import NARROW, TINY
from rewrite.codegen.kernels.target import unusable

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define(
    "scaled_linear(Tensor x, Tensor[] weight, str layout, Tensor[] h, Tensor[] B, float[] scale, SymInt[] start,"
    " Tensor d) -> Tensor"
)
_lib.define("scaled_branch(Tensor y, Tensor h, Tensor B, float scale, Tensor d) -> Tensor")
_lib.define(
    "scaled_branch_gradients(Tensor dy, Tensor out, Tensor h, Tensor B, float scale, Tensor d)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def scaled_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: str,
    h: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    start: Sequence[int],
    d: Tensor,
) -> Tensor:
    """`adapted_linear(x, weight, layout, None, h, B, scale, start) * d`, d (d_out,)."""
    if apart(x, h, B, start, d) is not None:
        return torch.ops.rewrite.adapted_linear(x, weight, layout, None, h, B, scale, start) * d
    y = torch.ops.rewrite.adapted_linear(x, weight, layout, None, [], [], [], [])
    return torch.ops.rewrite.scaled_branch(y, h[0].to(y.dtype), B[0].to(y.dtype), scale[0], d)


def apart(x: Tensor, h: Sequence[Tensor], B: Sequence[Tensor], start: Sequence[int], d: Tensor) -> str | None:
    """Why the multiplication is an operator of its own, or None."""
    if x.device.type != "cuda":
        return f"on {x.device.type}, a compiler fuses it with what follows"
    if reason := unusable(x.device):
        return reason
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    if dtype != torch.bfloat16 or d.dtype != dtype:  # the quotient out / d underflows in float16
        return f"a product of {dtype} and a scale of {d.dtype}"
    if len(h) != 1 or start[0] != 0 or B[0].shape[0] != d.shape[0]:
        return f"{len(h)} branches, or one of a part of the outputs"
    return f"rank {h[0].shape[-1]}, more than {NARROW}" if h[0].shape[-1] > NARROW else None


def divisible(d: Tensor) -> Tensor:
    """d with what is smaller than `TINY` replaced by it: `out / d` is v wherever d is 0 too."""
    return torch.where(d.abs() < TINY, TINY, d)


def _branch(y: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> Tensor:
    """y (..., N), h (..., r), B (N, r), d (N,) -> (..., N)."""
    return torch.addmm(_rows(y), _rows(h), B.t(), alpha=scale).mul_(divisible(d)).view(y.shape)


def _branch_cuda(y: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> Tensor:
    total = linear.Sum([_rows(h)], [B.t()], [scale], [0], given=_rows(y), factor=d)
    if total.supports() is not None:
        return _branch(y, h, B, scale, d)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    total.fused(out.view(total.M, total.N))
    return out


def _gradients(
    dy: Tensor, out: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, h, B and d in `scaled_branch`, from its result: dy and out (..., N)."""
    rows, low, d = _rows(dy), _rows(h), divisible(d)
    wide = torch.float32 if d.dtype.itemsize < 4 else d.dtype
    dd = (rows * _rows(out)).sum(0, dtype=wide) / d
    scaled = rows * d
    dh, dB = scaled @ B, scaled.t() @ low
    return scaled.view(dy.shape), (dh * scale).view(h.shape), dB * scale, dd.to(d.dtype)


def _gradients_cuda(dy, out, h, B, scale, d):
    rows, low, kept = _rows(dy), _rows(h), _rows(out)
    if gradients.supports(rows, low, B, (kept, d)) is not None:
        return _gradients(dy, out, h, B, scale, d)
    scaled, dh, dB, dd = gradients.scaled_gradients(rows, kept, low, B, scale, d)
    return scaled.view(dy.shape), dh.view(h.shape), dB, dd


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


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


_lib.impl("scaled_linear", scaled_linear, "CompositeImplicitAutograd")
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
