"""Sparse matrices: values at coordinates, or k of them in every row.

- `rewrite::sparse_product(x, values, rows, columns, d_out)`   S x, whose gradients never have the size of S

The backward pass keeps x and nothing of size (tokens, k); the gradient of the values is a sampled product, the inner
products of the rows of dy' and x' that the coordinates name.  On a GPU both run in `rewrite.codegen.kernels.sparse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils.flop_counter import register_flop_formula

from rewrite.codegen.forms.form import TOKENS, Form
from rewrite.codegen.kernels import sparse as kernels
from rewrite.codegen.tensors import wide_dtype

Tensor = torch.Tensor
GATHER = 100
"""A multiply-add of gathered operands takes as long as so many of a dense product (2048 tokens on one CPU thread)."""
LIGHT = 1 / 16
"""Up to this share of its entries a sparse matrix is never formed: its gradient would be as large as the weight."""
CHUNK = 1 << 22
"""Numbers that are gathered at a time."""

_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("sparse_product(Tensor x, Tensor values, Tensor? rows, Tensor columns, SymInt d_out) -> Tensor")
_lib.define(
    "sparse_product_backward(Tensor dy, Tensor x, Tensor values, Tensor? rows, Tensor columns) -> (Tensor, Tensor)"
)


@dataclass(frozen=True)
class Coordinates(Form):
    """`M[rows[q], columns[q]] += values[q]`: values (..., k), integer rows and columns (k,), for all of a stack.

    >>> Coordinates(torch.tensor([5.0]), torch.tensor([1]), torch.tensor([0]), d_out=2, d_in=3).materialise()
    tensor([[0., 0., 0.],
            [5., 0., 0.]])
    """

    values: Any
    rows: Any
    columns: Any
    d_out: int
    d_in: int

    def materialise(self) -> Tensor:
        at = self.rows.to(torch.int64) * self.d_in + self.columns.to(torch.int64)
        flat = self.values.new_zeros((*self.values.shape[:-1], self.d_out * self.d_in))
        return flat.index_add(-1, at, self.values).unflatten(-1, (self.d_out, self.d_in))

    def factored(self, x: Any) -> Any:
        return torch.ops.rewrite.sparse_product(x, self.values, self.rows, self.columns, self.d_out)

    def is_light(self) -> bool:
        return self.values.shape[-1] <= LIGHT * self.d_out * self.d_in

    def cost(self) -> sympy.Expr:
        return TOKENS * self.values.shape[-1] * GATHER

    def transpose(self) -> Form:
        return Coordinates(self.values, self.columns, self.rows, self.d_in, self.d_out)


@dataclass(frozen=True)
class RowSparse(Form):
    """`M[i, columns[i, q]] += values[i, q]`: values and integer columns (..., d_out, k), as many in every row.

    >>> RowSparse(torch.tensor([[5.0], [6.0]]), torch.tensor([[2], [0]]), d_in=3).materialise()
    tensor([[0., 0., 5.],
            [6., 0., 0.]])
    """

    values: Any
    columns: Any
    d_in: int

    def materialise(self) -> Tensor:
        empty = self.values.new_zeros((*self.values.shape[:-1], self.d_in))
        return empty.scatter_add(-1, self.columns.to(torch.int64), self.values)

    def factored(self, x: Any) -> Any:
        values, columns = self.values, self.columns
        return torch.ops.rewrite.sparse_product(x, values.flatten(), None, columns.flatten(), values.shape[-2])

    def is_light(self) -> bool:
        return self.values.shape[-1] <= LIGHT * self.d_in

    def cost(self) -> sympy.Expr:
        return TOKENS * self.values.shape[-1] * self.values.shape[-2] * GATHER


def scattered(count: int, d_out: int, d_in: int, seed: int | None) -> Tensor:
    """Distinct random coordinates, (2, count) as (rows, columns), in the order of their drawing.

    They are those of HF PEFT for its methods with random places; without a seed, those of an unseeded generator.

    >>> scattered(2, 3, 5, seed=0).shape
    torch.Size([2, 2])
    """
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    drawn = torch.randperm(d_out * d_in, generator=generator)[:count]
    return torch.stack([drawn // d_in, drawn % d_in])


def _chunks(values: Tensor, rows: Tensor | None, columns: Tensor, d_out: int, tokens: int) -> Iterator[Any]:
    """(values, rows, columns) in pieces that gather at most `CHUNK` numbers."""
    count = values.shape[0]
    if rows is None:  # as many in every row
        rows = torch.arange(d_out, device=values.device).repeat_interleave(count // max(d_out, 1))
    size = max(1, CHUNK // max(tokens, 1))
    for start in range(0, count, size):
        piece = slice(start, start + size)
        yield values[piece], rows[piece].to(torch.int64), columns[piece].to(torch.int64), piece


def _product(x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor, d_out: int) -> Tensor:
    """y (..., d_out) of x (..., d_in): tokens last while gathering, so that every coordinate names whole rows."""
    flat = x.reshape(-1, x.shape[-1]).t().contiguous()
    y = torch.zeros(d_out, flat.shape[1], dtype=wide_dtype(x.dtype), device=x.device)
    for v, i, j, _ in _chunks(values, rows, columns, d_out, flat.shape[1]):
        y.index_add_(0, i, (flat[j] * v[:, None]).to(y.dtype))
    return y.t().to(x.dtype).reshape(*x.shape[:-1], d_out).contiguous()


def _gradients(dy: Tensor, x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dvalues): dx of S' dy, and the sampled product of dy' x."""
    g, flat = (t.reshape(-1, t.shape[-1]).t().contiguous() for t in (dy, x))
    dx = torch.zeros(flat.shape, dtype=wide_dtype(x.dtype), device=x.device)
    dvalues = torch.zeros(values.shape, dtype=wide_dtype(x.dtype), device=x.device)
    for v, i, j, piece in _chunks(values, rows, columns, g.shape[0], g.shape[1]):
        dx.index_add_(0, j, (g[i] * v[:, None]).to(dx.dtype))
        dvalues[piece] = (g[i] * flat[j]).sum(-1, dtype=dvalues.dtype)
    return dx.t().to(x.dtype).reshape(x.shape).contiguous(), dvalues.to(values.dtype)


def _setup(ctx, inputs, output):
    x, values, rows, columns, _ = inputs
    ctx.save_for_backward(x, values, rows, columns)


def _backward(ctx, dy):
    dx, dvalues = torch.ops.rewrite.sparse_product_backward(dy, *ctx.saved_tensors)
    return dx, dvalues, None, None, None


def _product_cuda(x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor, d_out: int) -> Tensor:
    fast = kernels.supports(x, values, rows, columns, d_out) is None
    return (kernels.product if fast else _product)(x, values, rows, columns, d_out)


def _gradients_cuda(
    dy: Tensor, x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor
) -> tuple[Tensor, Tensor]:
    fast = kernels.supports(x, values, rows, columns, dy.shape[-1]) is None
    return (kernels.gradients if fast else _gradients)(dy, x, values, rows, columns)


_lib.impl("sparse_product", _product, "CompositeExplicitAutograd")
_lib.impl("sparse_product_backward", _gradients, "CompositeExplicitAutograd")
_lib.impl("sparse_product", _product_cuda, "CUDA")
_lib.impl("sparse_product_backward", _gradients_cuda, "CUDA")
torch.library.register_fake(
    "rewrite::sparse_product", lambda x, values, rows, columns, d_out: x.new_empty((*x.shape[:-1], d_out)), lib=_lib
)
torch.library.register_fake(
    "rewrite::sparse_product_backward",
    lambda dy, x, values, rows, columns: (x.new_empty(x.shape), values.new_empty(values.shape)),
    lib=_lib,
)
torch.library.register_autograd("rewrite::sparse_product", _backward, setup_context=_setup, lib=_lib)


@register_flop_formula(torch.ops.rewrite.sparse_product)
def _flops(x, values, rows, columns, d_out, *, out_shape=None, **_) -> int:
    return 2 * torch.Size(x[:-1]).numel() * values[0]


@register_flop_formula(torch.ops.rewrite.sparse_product_backward)
def _backward_flops(dy, x, values, rows, columns, *, out_shape=None, **_) -> int:
    return 2 * _flops(x, values, rows, columns, 0)
