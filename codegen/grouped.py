"""Products of grouped rows: tokens sorted by expert times a matrix per expert, as differentiable operators.

- `rewrite::grouped_product(x, M, offs)`   rows of group e times M[e]
- `rewrite::grouped_outer(x, y, offs)`     per group, x' y: the gradient of the matrices

Unlike `F.grouped_mm` they take any width (an adapter's rank is no multiple of 16 bytes) and any dtype, cast the
matrices to the rows' dtype without keeping the copy, and form no gradient for matrices that are frozen.  On CUDA
in bfloat16 they call `F.grouped_mm` on padded operands; elsewhere they loop over the groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("grouped_product(Tensor x, Tensor M, Tensor offs) -> Tensor")
_lib.define("grouped_outer(Tensor x, Tensor y, Tensor offs) -> Tensor")

_ALIGNED = 8  # bfloat16 numbers in the 16 bytes to which `F.grouped_mm` wants every stride aligned


def grouped_product(x: Tensor, M: Tensor, offs: Tensor) -> Tensor:
    """`y[start : end] = x[start : end] @ M[e]` for the rows of each group e, zero for rows beyond the last group.

    x (rows, k), sorted by group; M (groups, k, n), cast to x's dtype; offs (groups,) integers: where each group ends.
    Returns (rows, n).

    >>> grouped_product(torch.ones(3, 2), torch.ones(2, 2, 4), torch.tensor([1, 3])).shape
    torch.Size([3, 4])
    """
    M = M.to(x.dtype)
    if _has_kernel(x):
        y = F.grouped_mm(_pad(x.contiguous()), _pad(M, -2), offs=offs.to(torch.int32))[:, : M.shape[-1]]
        return y.masked_fill(_beyond(x, offs), 0.0)  # rows that the kernel did not write
    y = x.new_zeros(x.shape[0], M.shape[-1])
    for group, start, end in _groups(offs):
        torch.mm(x[start:end], M[group], out=y[start:end])
    return y


def grouped_outer(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    """`M[e] = x[start : end].T @ y[start : end]` over the rows of each group e, zero for empty groups.

    x (rows, k) and y (rows, n) of one dtype, sorted by group; offs (groups,).  Returns (groups, k, n).
    """
    if _has_kernel(x):
        M = F.grouped_mm(_pad(x.contiguous()).t(), _pad(y.contiguous()), offs=offs.to(torch.int32))
        return M[:, : x.shape[1], : y.shape[1]].contiguous()
    M = x.new_zeros(offs.shape[0], x.shape[1], y.shape[1])
    for group, start, end in _groups(offs):
        torch.mm(x[start:end].t(), y[start:end], out=M[group])
    return M


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _pad(t: Tensor, *dims: int) -> Tensor:
    """Zeros behind the last dimension, and `dims`, up to a multiple of the alignment."""
    widths = [0, -t.shape[-1] % _ALIGNED]
    for dim in dims:
        widths += [0, -t.shape[dim] % _ALIGNED]
    return F.pad(t, widths) if any(widths) else t


def _beyond(x: Tensor, offs: Tensor) -> Tensor:
    return (torch.arange(x.shape[0], device=x.device) >= offs[-1])[:, None]


def _groups(offs: Tensor) -> list[tuple[int, int, int]]:
    """(group, start, end) of the groups that have rows; one synchronisation with the device."""
    ends = offs.tolist()
    return [(g, start, end) for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start != end]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, M, offs = ctx.saved_tensors
    need_x, need_M, _ = ctx.needs_input_grad
    dx = torch.ops.rewrite.grouped_product(dy, M.transpose(-2, -1), offs) if need_x else None
    dM = torch.ops.rewrite.grouped_outer(x, dy, offs).to(M.dtype) if need_M else None
    return dx, dM, None


_lib.impl("grouped_product", grouped_product, "CompositeExplicitAutograd")
_lib.impl("grouped_outer", grouped_outer, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rewrite::grouped_product", lambda x, M, offs: x.new_empty(x.shape[0], M.shape[-1]), lib=_lib
)
torch.library.register_fake(
    "rewrite::grouped_outer", lambda x, y, offs: x.new_empty(offs.shape[0], x.shape[1], y.shape[1]), lib=_lib
)
torch.library.register_autograd("rewrite::grouped_product", _backward, setup_context=_setup, lib=_lib)


@register_flop_formula(torch.ops.rewrite.grouped_product)
def _product_flops(x, M, offs, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[1] * M[-1]


@register_flop_formula(torch.ops.rewrite.grouped_outer)
def _outer_flops(x, y, offs, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[1] * y[1]


# PyTorch counts no grouped product of its own: rows times a matrix each, or, for the gradient, rows times rows.
if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _grouped_mm_flops(a, b, *_, out_shape=None, **__) -> int:
        return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)
