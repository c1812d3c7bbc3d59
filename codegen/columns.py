"""What scales every output of a layer, and its gradient, on a CPU: one number for each column.

- `rewrite::column_sums(a, b)`                                  `a * b` summed over rows: the gradient of such a scale
- `rewrite::scaled_low_rank_gradients(dy, y, d, h, B, scale)`   all gradients of `d * (y + s h B')` from one read of dy
- `rewrite::quotient(a, b)`                                     `a / b`, once: DoRA's magnitudes over its norms

`passes/columns.py` finds them in backward graphs, which nothing differentiates.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.branches import low_rank_gradients
from rewrite.codegen.cpu import operators
from rewrite.codegen.tensors import as_rows, wide_dtype

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("column_sums(Tensor a, Tensor b) -> Tensor")
_lib.define(
    "scaled_low_rank_gradients(Tensor dy, Tensor y, Tensor d, Tensor h, Tensor B, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("quotient(Tensor a, Tensor b) -> Tensor")


def column_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a * b`, each (..., N), summed over all rows, in float32 at least: (N,)."""
    if cpu := operators.serving(a, b):
        return cpu.column_sums(a, b)
    x, y, wide = as_rows(a), as_rows(b), wide_dtype(a.dtype)
    return (x.to(wide) * y.to(wide)).sum(0).to(a.dtype)


def scaled_low_rank_gradients(
    dy: Tensor, y: Tensor, d: Tensor, h: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `z = d * y`, where y has `scale * h B'` in it: the gradients of y, d, h and B.

    dy and y (..., N), d (N,), h (..., r), B (N, r) -> (..., N), (N,), (..., r), (N, r).
    """
    if cpu := operators.serving(dy, y, d, h, B):
        return cpu.scaled_low_rank_gradients(dy, y, d, h, B, scale)
    dz = dy * d
    return dz, column_sums(dy, y), *low_rank_gradients(dz, h, B, scale)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, once: Inductor would divide again for every row that the quotient scales."""
    return a / b


_lib.impl("column_sums", column_sums, "CompositeExplicitAutograd")
_lib.impl("scaled_low_rank_gradients", scaled_low_rank_gradients, "CompositeExplicitAutograd")
_lib.impl("quotient", quotient, "CompositeExplicitAutograd")
torch.library.register_fake("rewrite::column_sums", lambda a, b: a.new_empty(a.shape[-1]), lib=_lib)
torch.library.register_fake("rewrite::quotient", lambda a, b: torch.empty_like(a), lib=_lib)
torch.library.register_fake(
    "rewrite::scaled_low_rank_gradients",
    lambda dy, y, d, h, B, scale: tuple(like.new_empty(like.shape) for like in (dy, d, h, B)),
    lib=_lib,
)


@register_flop_formula(torch.ops.rewrite.scaled_low_rank_gradients)
def _flops(dy, y, d, h, B, scale, **_) -> int:
    return 4 * torch.Size(dy).numel() * B[1]
