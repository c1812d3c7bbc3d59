"""Dropout whose mask is a function of a seed: computed where it is needed, forward and backward, never stored.

- `rewrite::draw(like)`                              a fresh seed on the device of `like`, from PyTorch's generator
- `rewrite::dropout(x, seed, p)`                     the dropped x; keeps the seed for backward, 8 bytes
- `rewrite::dropped_linear(x, A, seed, ranks, p)`    `linear(dropout(x), A)`, without the dropped copy of x

Which elements are dropped, to the bit: `rewrite.codegen.masks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.below import define_below
from rewrite.codegen.costs import register_flops_of_results
from rewrite.codegen.cpu import operators
from rewrite.codegen.kernels import dropout as kernels
from rewrite.codegen.masks import kept, scale
from rewrite.codegen.tensors import as_rows, autocast, autocast_dtype

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("draw(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_lib.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")
_lib.define("dropped_linear(Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p) -> Tensor")
_lib.define("dropped_linear_core(Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p) -> Tensor")
_lib.define(
    "dropped_linear_gradients(Tensor dh, Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p, bool input)"
    " -> (Tensor, Tensor)"
)

_SEEDS = (1 << 63) - 1


def _draw(like: Tensor) -> Tensor:
    return torch.randint(_SEEDS, (1,), dtype=torch.int64, device=like.device)


def _masked(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The elements of a matrix that are kept, zero elsewhere."""
    return torch.where(kept(x.shape[0], x.shape[1], seed, p), x, x.new_zeros(()))


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x / (1 - p) where it is kept, 0 elsewhere."""
    if cpu := operators.serving(x, seed):
        return cpu.dropout(x, seed, p)
    return (_masked(as_rows(x), seed, p) * scale(p)).view(x.shape)


def _dropout_setup(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx, dy):
    return torch.ops.rewrite.dropout(dy, *ctx.saved_tensors, ctx.p), None, None


def dropped_linear(x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]) -> Tensor:
    """`h = [linear(dropout(x, seed_i, p_i), A_i)]` for factors that share x, each with a mask of its own.

    x (..., d_in); A (sum of ranks, d_in), the factors one above the other; seed (n,); returns (..., sum of ranks).
    Follows autocast.
    """
    if dtype := autocast_dtype(x):
        x, A = autocast(x, dtype), autocast(A, dtype)
    elif A.dtype != x.dtype:
        A = A.to(x.dtype)
    return torch.ops.rewrite.dropped_linear_core(x, A, seed, ranks, p)


def linear(x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]) -> Tensor:
    """`dropped_linear` without autocast."""
    if cpu := operators.serving(x, A, seed):
        return cpu.dropped_linear_core(x, A, seed, ranks, p)
    rows = as_rows(x)
    h = x.new_empty(*x.shape[:-1], A.shape[0])
    for part, Ai, si, pi in zip(as_rows(h).split(ranks, -1), A.split(ranks), seed.split(1), p, strict=True):
        torch.mul(F.linear(_masked(rows, si, pi), Ai), scale(pi), out=part)
    return h


def linear_gradients(dh, x, A, seed, ranks, p, input):
    """The gradients of x, if it is asked for by `input`, and of A."""
    if cpu := operators.serving(dh, x, A, seed):
        return cpu.dropped_linear_gradients(dh, x, A, seed, ranks, p, input)
    rows, dh, dA = as_rows(x), as_rows(dh), torch.empty_like(A)
    for part, di, si, pi in zip(dA.split(ranks), dh.split(ranks, -1), seed.split(1), p, strict=True):
        torch.mul(di.t() @ _masked(rows, si, pi), scale(pi), out=part)
    if not input:
        return rows.new_empty(0), dA
    dx = rows.new_zeros(rows.shape)
    _add_input_gradient(dx, dh, A, seed, ranks, p)
    return dx.view(x.shape), dA


def _add_input_gradient(dx: Tensor, dh: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]):
    for di, Ai, si, pi in zip(dh.split(ranks, -1), A.split(ranks), seed.split(1), p, strict=True):
        dx += _masked((di @ Ai) * scale(pi), si, pi)


def add_input_gradient(
    dx: Tensor, dh: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]
) -> None:
    """Add the gradient of x in `dropped_linear(x, A, ...)` to a matrix dx (M, d_in), in place; dh (M, sum of ranks)."""
    if dx.is_cuda and dx.is_contiguous() and kernels.supports(dx, A, ranks, p) is None:
        kernels.input_gradient(dh.contiguous(), A, seed, ranks, p, dx, add=True)
    else:
        _add_input_gradient(dx, dh, A, seed, ranks, p)


def _dropout_cuda(x: Tensor, seed: Tensor, p: float) -> Tensor:
    rows = as_rows(x)
    rows = rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
    if kernels.supports_dropout(rows, p) is not None:
        return dropped(x, seed, p)
    return kernels.dropout(rows, seed, p).view(x.shape)


def _linear_cuda(x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]) -> Tensor:
    rows = as_rows(x)
    if kernels.supports(rows, A, ranks, p) is not None:
        return linear(x, A, seed, ranks, p)
    return kernels.linear(rows, A, seed, ranks, p).view(*x.shape[:-1], A.shape[0])


def _linear_gradients_cuda(dh, x, A, seed, ranks, p, input):
    rows, low = as_rows(x), as_rows(dh).contiguous()
    if kernels.supports(rows, A, ranks, p) is not None:
        return linear_gradients(dh, x, A, seed, ranks, p, input)
    dA = kernels.gradient(low, rows, seed, ranks, p)
    dx = x.new_empty(x.shape if input else (0,))
    if input:
        kernels.input_gradient(low, A, seed, ranks, p, as_rows(dx), add=False)
    return dx, dA


def _linear_setup(ctx, inputs, output):
    x, A, seed, ctx.ranks, ctx.p = inputs
    ctx.save_for_backward(x, A, seed)


def _linear_backward(ctx, dh):
    need_x, need_A, *_ = ctx.needs_input_grad
    dx, dA = torch.ops.rewrite.dropped_linear_gradients(dh, *ctx.saved_tensors, ctx.ranks, ctx.p, need_x)
    return dx if need_x else None, dA if need_A else None, None, None, None


_lib.impl("draw", _draw, "CompositeImplicitAutograd")
_lib.impl("dropout", dropped, "CompositeExplicitAutograd")
_lib.impl("dropped_linear", dropped_linear, "CompositeImplicitAutograd")
_lib.impl("dropped_linear_core", linear, "CompositeExplicitAutograd")
_lib.impl("dropped_linear_gradients", linear_gradients, "CompositeExplicitAutograd")
_lib.impl("dropout", _dropout_cuda, "CUDA")
_lib.impl("dropped_linear_core", _linear_cuda, "CUDA")
_lib.impl("dropped_linear_gradients", _linear_gradients_cuda, "CUDA")


@torch.library.register_fake("rewrite::dropout", lib=_lib)
def _dropout_fake(x, seed, p):
    return x.new_empty(x.shape)


@torch.library.register_fake("rewrite::dropped_linear_core", lib=_lib)
def _linear_fake(x, A, seed, ranks, p):
    return x.new_empty(*x.shape[:-1], A.shape[0])


@torch.library.register_fake("rewrite::dropped_linear_gradients", lib=_lib)
def _linear_gradients_fake(dh, x, A, seed, ranks, p, input):
    return x.new_empty(x.shape if input else (0,)), torch.empty_like(A)


torch.library.register_autograd("rewrite::dropout", _dropout_backward, setup_context=_dropout_setup, lib=_lib)
torch.library.register_autograd("rewrite::dropped_linear_core", _linear_backward, setup_context=_linear_setup, lib=_lib)
for _op, _fake, _reference, _cuda in (
    (torch.ops.rewrite.dropout.default, _dropout_fake, dropped, _dropout_cuda),
    (torch.ops.rewrite.dropped_linear_core.default, _linear_fake, linear, _linear_cuda),
):
    define_below(_lib, _op, _fake, CompositeExplicitAutograd=_reference, CUDA=_cuda)


@register_flop_formula(torch.ops.rewrite.dropped_linear_core)
def _linear_flops(x, A, *_, **__) -> int:
    return 2 * torch.Size(x[:-1]).numel() * A[0] * A[1]


@register_flops_of_results(torch.ops.rewrite.dropped_linear_gradients)
def _linear_gradients_flops(dh, x, A, seed, ranks, p, input) -> tuple[int, int]:
    one = _linear_flops(x, A)
    return one if input else 0, one
