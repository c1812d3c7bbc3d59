"""Sparse updates on a GPU: products of gathered lines, where a line is one channel of all tokens.

Channels of row-major activations lie far apart, so a coordinate would read 32 bytes for one number.  The activations
are copied with tokens last once (2 x their size, near copy speed); then every coordinate reads whole lines, from the
second-level cache: 2 bytes x tokens for a product, twice that for a sampled one.  Sums have a fixed order: the
entries of a row one after the other, the slabs of tokens of a sampled product in a second step.  No atomics.

Where entries are not ordered by row, they are sorted in every call: methods move coordinates in place between
steps, and a replayed CUDA graph runs no host code that could notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels.kernel import Config, Kernel, tiles_of, triton_type
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
_LINE = 64  # tokens of a channel are a multiple of it: whole sectors, and vectors of 16 bytes
_SLAB = 1024  # tokens of a partial sum: two operands of 4096 channels are 16 MB of the second-level cache
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)


class _OverLines(Kernel):
    """What the kernels over lines share: the template knows how long a line is."""

    def names(self) -> dict[str, Any]:
        return {**super().names(), "line": _LINE}


@dataclass(frozen=True)
class TokensLast(_OverLines):
    """out[c, t] = x[t, c], and zeros behind the tokens, to the end of the last 64"""

    columns: int
    dtype: torch.dtype

    name = "tokens_last"
    applies = "the activations of a sparse product, before their channels are gathered"
    cpu = "PyTorch, as a copy"

    def supports(self) -> str | None:
        return None if self.dtype in _FLOATS else f"activations are {self.dtype}"

    def arguments(self) -> Mapping[str, str]:
        pointer = f"*{triton_type(self.dtype)}"
        return {"x": pointer, "out": pointer, "tokens": "i32", "lines": "i32", "stride": "i64"}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, BLOCK_T=64, BLOCK_C=64), Config.of(warps=8, BLOCK_T=128, BLOCK_C=64)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(self.columns, config["BLOCK_C"]), tiles_of(sizes["lines"] * _LINE, config["BLOCK_T"])


@dataclass(frozen=True)
class SparseProduct(_OverLines):
    """y[t, i] = sum of values[q] x[columns[q], t] over the entries q of row i

    `each` entries in every row, or, where it is 0, those that `order` has from first[i] to first[i + 1].
    """

    rows: int
    each: int
    dtype: torch.dtype
    values: torch.dtype
    indices: torch.dtype

    name = "sparse_product"
    applies = "sparse updates, and their gradient of the input"
    cpu = "PyTorch, index_add over gathered lines"

    def supports(self) -> str | None:
        wrong = [t for t in (self.dtype, self.values) if t not in _FLOATS]
        wrong += [self.indices] if self.indices not in _INDICES else []
        return f"no kernel for {wrong[0]}" if wrong else None

    def arguments(self) -> Mapping[str, str]:
        x, index = f"*{triton_type(self.dtype)}", f"*{triton_type(self.indices)}"
        entries = {"values": f"*{triton_type(self.values)}", "columns": index}
        sorted_ = {} if self.each else {"order": "*i32", "first": "*i32"}
        return {"x": x, **entries, **sorted_, "y": x, "tokens": "i32", "lines": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        unroll = 4 if not self.each else 1 << (min(self.each, 4).bit_length() - 1)
        return [
            Config.of(warps=4, BLOCK_T=64, BLOCK_R=32, UNROLL=unroll),
            Config.of(warps=4, BLOCK_T=128, BLOCK_R=16, UNROLL=unroll),
            Config.of(warps=2, BLOCK_T=16, BLOCK_R=16, UNROLL=unroll),
        ]

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        return configs[2] if sizes["tokens"] <= 16 else configs[0]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(self.rows, config["BLOCK_R"]), tiles_of(sizes["tokens"], config["BLOCK_T"])


@dataclass(frozen=True)
class SparseSampled(_OverLines):
    """partial[s, q] = sum of dy[rows[q], t] x[columns[q], t] over the tokens t of slab s

    With `each` entries in every row, entry q is of row q // each.  Slabs are as long as keeps both operands of one in
    the second-level cache while all entries read it.
    """

    count: int
    each: int
    dtype: torch.dtype
    indices: torch.dtype

    name = "sparse_sampled"
    applies = "the gradient of the values of a sparse update"
    cpu = "PyTorch, sums of gathered products"

    def supports(self) -> str | None:
        wrong = self.dtype if self.dtype not in _FLOATS else self.indices if self.indices not in _INDICES else None
        return f"no kernel for {wrong}" if wrong else None

    def arguments(self) -> Mapping[str, str]:
        x, index = f"*{triton_type(self.dtype)}", f"*{triton_type(self.indices)}"
        rows = {} if self.each else {"rows": index}
        return {"dy": x, "x": x, **rows, "columns": index, "partial": "*fp32", "lines": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [
            Config.of(warps=4, SLAB=_SLAB, BLOCK_T=128, BLOCK_Q=16),
            Config.of(warps=4, SLAB=_SLAB, BLOCK_T=64, BLOCK_Q=32),
        ]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(self.count, config["BLOCK_Q"]), tiles_of(sizes["lines"] * _LINE, _SLAB)


def supports(x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor, d_out: int) -> str | None:
    """Why there is no kernel for a sparse product and its gradients, or None."""
    if reason := unusable(x.device):
        return reason
    if rows is not None and rows.dtype != columns.dtype:
        return f"rows are {rows.dtype}, columns {columns.dtype}"
    each = _each(values, rows, d_out)
    return SparseProduct(d_out, each, x.dtype, values.dtype, columns.dtype).supports()


def product(x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor, d_out: int) -> Tensor:
    """S x (..., d_out) of x (..., d_in), as `rewrite::sparse_product` defines it."""
    lines, tokens = _lines(x)
    order = () if rows is None else _by(rows, d_out)
    return _product(lines, tokens, values, columns, order, d_out).view(*x.shape[:-1], d_out)


def gradients(dy: Tensor, x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dvalues), as `rewrite::sparse_product_backward` defines them."""
    (dlines, tokens), (lines, _) = _lines(dy), _lines(x)
    dvalues = _sampled(dlines, lines, values, rows, columns)
    of_entry = _row_of_entry(values, columns, dy.shape[-1]) if rows is None else rows
    order = _by(columns, x.shape[-1])
    return _product(dlines, tokens, values, of_entry, order, x.shape[-1]).view(x.shape), dvalues


def _product(
    lines: Tensor, tokens: int, values: Tensor, columns: Tensor, order: tuple[Tensor, ...], d_out: int
) -> Tensor:
    y = lines.new_empty(tokens, d_out)
    each = 0 if order else values.shape[0] // max(d_out, 1)
    if not values.shape[0]:
        return y.zero_()
    kernel = SparseProduct(d_out, each, lines.dtype, values.dtype, columns.dtype)
    kernel.launch(
        lines, values.contiguous(), columns.contiguous(), *order, y, tokens=tokens, lines=lines.shape[1] // _LINE
    )
    return y


def _sampled(dlines: Tensor, lines: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    count, padded = values.shape[0], lines.shape[1]
    if not count or not padded:
        return torch.zeros_like(values)
    kernel = SparseSampled(count, _each(values, rows, dlines.shape[0]), lines.dtype, columns.dtype)
    slabs = tiles_of(padded, _SLAB)
    partial = lines.new_empty(slabs, count, dtype=torch.float32)
    given = () if rows is None else (rows.contiguous(),)
    kernel.launch(dlines, lines, *given, columns.contiguous(), partial, lines=padded // _LINE)
    return partial.sum(0).to(values.dtype)


def _lines(x: Tensor) -> tuple[Tensor, int]:
    """x (..., d) as (d, tokens), padded with zeros to whole lines; and the number of tokens."""
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    padded = tiles_of(tokens, _LINE) * _LINE
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(rows.shape[1], padded)
    TokensLast(rows.shape[1], x.dtype).launch(rows, out, tokens=tokens, lines=padded // _LINE, stride=rows.stride(0))
    return out, tokens


def _by(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(order, first): the entries sorted by `index`, each in its first order, and where those of 0 .. count begin."""
    sorted_, order = torch.sort(index, stable=True)
    bounds = torch.arange(count + 1, device=index.device, dtype=index.dtype)
    return order.to(torch.int32), torch.searchsorted(sorted_, bounds, out_int32=True)


def _row_of_entry(values: Tensor, columns: Tensor, d_out: int) -> Tensor:
    entries = torch.arange(values.shape[0], device=columns.device, dtype=columns.dtype)
    return entries // max(_each(values, None, d_out), 1)


def _each(values: Tensor, rows: Tensor | None, d_out: int) -> int:
    """Entries in every row; 0 where rows say which one an entry is of."""
    return values.shape[0] // max(d_out, 1) if rows is None else 0


_BF16, _INT = torch.bfloat16, torch.int32
EXAMPLES = (
    TokensLast(4096, _BF16),
    SparseProduct(4096, 0, _BF16, _BF16, _INT),  # SHiRA
    SparseProduct(14336, 1, _BF16, _BF16, _INT),  # NeuroAda
    SparseProduct(4096, 0, torch.float32, torch.float32, _INT),
    SparseSampled(64 * 8192, 0, _BF16, _INT),
    SparseSampled(14336, 1, _BF16, _INT),
)
