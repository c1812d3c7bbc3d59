"""Rows of a batch on different adapters on a GPU: tiles of rows and ranks that no gate opens are skipped.

A row belongs to the gate `row // T`, T rows of the product for each row of the batch.  Which tiles are open is found on
the device (`SegmentedTiles`), so that a launch depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels.kernel import Config, Kernel, precision, tiles_of, triton_type
from rewrite.codegen.kernels.outer_product import FULL, OuterProduct
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
DTYPES = torch.bfloat16, torch.float16, torch.float32
_FEW = 64
"""Rows up to which tiles are as short as `tl.dot` takes them: decoding, a row for each of many adapters."""


@dataclass(frozen=True)
class SegmentedTiles(Kernel):
    """tiles[i, j] = whether any gate opens any rank of tile j for any row of tile i"""

    R: int
    rows: int
    ranks: int
    gate_row: int
    gate: torch.dtype

    name = "segmented_tiles"
    applies = "before every other segmented kernel"
    cpu = "the values of the gates, read on the host"

    def supports(self) -> str | None:
        return None

    def arguments(self) -> Mapping[str, str]:
        return {"gate": f"*{triton_type(self.gate)}", "tiles": "*i8", "M": "i32", "T": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=1, stages=1)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(sizes["M"], self.rows), tiles_of(self.R, self.ranks)


@dataclass(frozen=True)
class _Segmented(Kernel):
    """What the products of segments share: `rows` x `ranks` are the tiles that are skipped as a whole."""

    R: int
    rows: int
    ranks: int
    gate_row: int
    gate: torch.dtype
    dtype: torch.dtype

    cpu = "ATen, on the rows of every adapter"

    def supports(self) -> str | None:
        if self.dtype not in DTYPES:
            return f"{str(self.dtype).removeprefix('torch.')} has no product on tensor cores"
        return None

    def names(self) -> dict[str, Any]:
        return {**super().names(), "precision": precision(self.dtype)}

    @property
    def tiles(self) -> int:
        return tiles_of(self.R, self.ranks)

    @property
    def padded(self) -> int:
        return 1 << (self.tiles - 1).bit_length()


@dataclass(frozen=True)
class SegmentedShrink(_Segmented):
    """h = (x A') * gate, zero where no gate of a tile is open

    A (R, K) is from rank to rank `a_row`, along K `a_column`; one of the two is 1.
    """

    K: int
    x_row: int
    a_row: int
    a_column: int

    name = "segmented_shrink"
    applies = "named adapters that are chosen by rows, down, and their gradients"

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        return {"x": of, "A": of, "gate": f"*{triton_type(self.gate)}", "h": of, "M": "i32", "T": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        if self.rows < 64:
            return [Config.of(warps=4, stages=4, BLOCK_K=256), Config.of(warps=4, stages=4, BLOCK_K=128)]
        return [Config.of(warps=4, stages=4, BLOCK_K=64), Config.of(warps=4, stages=3, BLOCK_K=128)]

    def shared(self, config: Config) -> int:
        return (self.rows + self.ranks) * config["BLOCK_K"] * config.stages * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(sizes["M"], self.rows), self.tiles


@dataclass(frozen=True)
class SegmentedExpand(_Segmented):
    """y = y + h B' in place, or h B', over the ranks whose gate is open

    B (N, R) is from row to row `b_row`, along R `b_column`; one of the two is 1.
    """

    N: int
    h_row: int
    b_row: int
    b_column: int
    add: bool

    name = "segmented_expand"
    applies = "named adapters that are chosen by rows, up, and their gradients"

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        gate = {"gate": f"*{triton_type(self.gate)}", "tiles": "*i8"}
        return {"h": of, "B": of, **gate, "y": of, "M": "i32", "T": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, stages=2, BLOCK_N=128), Config.of(warps=4, stages=2, BLOCK_N=64)]

    def shared(self, config: Config) -> int:
        return (self.rows + config["BLOCK_N"]) * self.ranks * self.dtype.itemsize

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        """Wide tiles read h less often; narrow ones make enough programs of few rows."""
        programs = tiles_of(sizes["M"], self.rows) * tiles_of(self.N, configs[0]["BLOCK_N"])
        return configs[0] if programs >= FULL else configs[-1]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return tiles_of(sizes["M"], self.rows), tiles_of(self.N, config["BLOCK_N"])


def reason(rows: Tensor, matrix: Tensor, gate: Tensor) -> str | None:
    """Why no kernel multiplies these, or None."""
    if rows.dtype not in DTYPES:
        return f"{str(rows.dtype).removeprefix('torch.')} has no product on tensor cores"
    if 0 in matrix.shape:
        return "an empty matrix"
    return unusable(rows.device)


def shrink(x: Tensor, A: Tensor, gate: Tensor) -> Tensor:
    """`(x A') * gate`: x (batch, ..., K), A (R, K) of one dtype, gate (batch, R)."""
    given, gate = matrix(x), _dense(gate)
    M, T, tiles = _sizes(given, gate)
    A = A if 1 in A.stride() else A.contiguous()
    shape = {"K": A.shape[1], "x_row": given.stride(0), "a_row": A.stride(0), "a_column": A.stride(1)}
    h = x.new_empty(*x.shape[:-1], A.shape[0])
    SegmentedShrink(A.shape[0], *tiles, gate.stride(0), gate.dtype, x.dtype, **shape).launch(
        given, A, gate, h, M=M, T=T
    )
    return h


def expand(y: Tensor | None, h: Tensor, B: Tensor, gate: Tensor) -> Tensor:
    """`y + h B'`, in y itself, or `h B'`: h (batch, ..., R), B (N, R) of one dtype, gate (batch, R), y contiguous."""
    given, gate = matrix(h), _dense(gate)
    M, T, tiles = _sizes(given, gate)
    B = B if 1 in B.stride() else B.contiguous()
    shape = {"N": B.shape[0], "h_row": given.stride(0), "b_row": B.stride(0), "b_column": B.stride(1)}
    kernel = SegmentedExpand(B.shape[1], *tiles, gate.stride(0), gate.dtype, h.dtype, **shape, add=y is not None)
    y = h.new_empty(*h.shape[:-1], B.shape[0]) if y is None else y
    kernel.launch(given, B, gate, open_tiles(gate, M, T, *tiles), y, M=M, T=T)
    return y


def outer(h: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`h' x` over the rows whose gate is open: h (batch, ..., R), x (batch, ..., N), gate (batch, R) -> (R, N)."""
    given, gate = matrix(h), _dense(gate)
    M, T, tiles = _sizes(given, gate)
    return OuterProduct.of(given, matrix(x), tiles, gate).compute(
        given, matrix(x), gate, open_tiles(gate, M, T, *tiles), T
    )


def open_tiles(gate: Tensor, M: int, T: int, rows: int, ranks: int) -> Tensor:
    """(tiles of rows, tiles of ranks) int8: those that any gate opens."""
    R = gate.shape[1]
    tiles = torch.empty(tiles_of(M, rows), tiles_of(R, ranks), dtype=torch.int8, device=gate.device)
    SegmentedTiles(R, rows, ranks, gate.stride(0), gate.dtype).launch(gate, tiles, M=M, T=T)
    return tiles


def matrix(t: Tensor) -> Tensor:
    """(..., n) as rows that lie side by side or apart, but have no gaps: a view where it can be one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _dense(gate: Tensor) -> Tensor:
    return gate if gate.stride(1) == 1 else gate.contiguous()


def _sizes(rows: Tensor, gate: Tensor) -> tuple[int, int, tuple[int, int]]:
    """(M, rows for each of the batch, (rows of a tile, ranks of a tile))."""
    M, (batch, R) = rows.shape[0], gate.shape
    return M, M // max(batch, 1), (16 if M <= _FEW else 64, 16 if R <= 16 else 32)


EXAMPLES = (
    SegmentedTiles(192, 64, 32, 192, torch.bfloat16),
    SegmentedShrink(192, 64, 32, 192, torch.bfloat16, torch.bfloat16, K=4096, x_row=4096, a_row=4096, a_column=1),
    SegmentedShrink(1600, 16, 32, 1600, torch.bfloat16, torch.bfloat16, K=4096, x_row=4096, a_row=4096, a_column=1),
    SegmentedShrink(192, 64, 32, 192, torch.bfloat16, torch.bfloat16, K=14336, x_row=14336, a_row=1, a_column=192),
    SegmentedExpand(
        192, 64, 32, 192, torch.bfloat16, torch.bfloat16, N=14336, h_row=576, b_row=192, b_column=1, add=True
    ),
    SegmentedExpand(
        1600, 16, 32, 1600, torch.bfloat16, torch.bfloat16, N=4096, h_row=1600, b_row=1600, b_column=1, add=True
    ),
    SegmentedExpand(
        192, 64, 32, 192, torch.float32, torch.float16, N=4096, h_row=192, b_row=1, b_column=4096, add=False
    ),
)
