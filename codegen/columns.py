"""What scales every output of a layer, and its gradient, on a CPU: one number for each column.

- `rewrite::column_sums(a, b)`      `a * b` summed over rows: the gradient of such a scale
- `rewrite::scaled_sums(a, b, d)`   `a * d` besides, from the same pass; `scaled_sums_` puts it in place of a
- `rewrite::quotient(a, b)`         `a / b`, once: DoRA's magnitudes over its norms

`passes/columns.py` finds them, in graphs that nothing differentiates.
"""

from __future__ import annotations

import torch

from rewrite.codegen.cpu import operators
from rewrite.codegen.tensors import as_rows, wide_dtype

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("column_sums(Tensor a, Tensor b) -> Tensor")
_lib.define("scaled_sums(Tensor a, Tensor b, Tensor d) -> (Tensor, Tensor)")
_lib.define("scaled_sums_(Tensor(a!) a, Tensor b, Tensor d) -> Tensor")
_lib.define("quotient(Tensor a, Tensor b) -> Tensor")


def column_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a * b`, each (..., N), summed over all rows, in float32 at least: (N,)."""
    if cpu := operators.serving(a, b):
        return cpu.column_sums(a, b)
    x, y, wide = as_rows(a), as_rows(b), wide_dtype(a.dtype)
    return (x.to(wide) * y.to(wide)).sum(0).to(a.dtype)


def scaled_sums(a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`a * d` and `column_sums(a, b)`: a and b (..., N), d (N,) -> (..., N), (N,)."""
    if cpu := operators.serving(a, b, d):
        return cpu.scaled_sums(a, b, d)
    return a * d, column_sums(a, b)


def scaled_sums_(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """`column_sums(a, b)`, and `a *= d`."""
    if cpu := operators.serving(a, b, d):
        return cpu.scaled_sums_(a, b, d)
    sums = column_sums(a, b)
    a.mul_(d)
    return sums


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, once: Inductor would divide again for every row that the quotient scales."""
    return a / b


_lib.impl("column_sums", column_sums, "CompositeExplicitAutograd")
_lib.impl("scaled_sums", scaled_sums, "CompositeExplicitAutograd")
_lib.impl("scaled_sums_", scaled_sums_, "CompositeExplicitAutograd")
_lib.impl("quotient", quotient, "CompositeExplicitAutograd")
torch.library.register_fake("rewrite::column_sums", lambda a, b: a.new_empty(a.shape[-1]), lib=_lib)
torch.library.register_fake(
    "rewrite::scaled_sums", lambda a, b, d: (a.new_empty(a.shape), a.new_empty(a.shape[-1])), lib=_lib
)
torch.library.register_fake("rewrite::scaled_sums_", lambda a, b, d: a.new_empty(a.shape[-1]), lib=_lib)
torch.library.register_fake("rewrite::quotient", lambda a, b: torch.empty_like(a), lib=_lib)
