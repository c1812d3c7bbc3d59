"""Gradients of a low-rank branch on a GPU: all from one read of dy, and the same bits in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels import plans
from rewrite.codegen.kernels.kernel import Config, Kernel, precision, tiles_of, triton_type
from rewrite.codegen.kernels.products import HALVES, NARROW, TINY, padded, row_stride
from rewrite.codegen.kernels.target import Target, multiprocessors, unusable

Tensor = torch.Tensor


@dataclass(frozen=True)
class LowRankGradients(Kernel):
    """dh_parts[j] = dy_j B_j and dB_parts[i] = dy_i' h_i, for the blocks of columns j and of rows i of dy

    Where it is `scaled`, of `out = (y + h B') * d`: dh and dB of dy * d, which is stored too, and the gradient of d,
    dd_parts[i] = sum_i dy out / d.  No atomics: every program has parts of its own, and `SumOfParts` adds in order.
    """

    N: int
    rank: int
    width: int
    """Columns of dy that a program has."""
    dy_row: int
    h_row: int
    B_row: int
    dtype: torch.dtype
    scaled: bool = False

    name = "low_rank_gradients"
    applies = "dh and dB of a branch, where dy is too large for the L2 cache"
    cpu = "ATen: two products"
    products = True

    def supports(self) -> str | None:
        if self.dtype not in HALVES:
            return f"{str(self.dtype).removeprefix('torch.')}: cuBLAS is faster"
        most = NARROW // 2 if self.scaled else NARROW  # where out is read too, registers spill beyond
        if self.rank > most or 0 in (self.rank, self.N):
            return f"rank {self.rank}, not in 1 ... {most}"
        return None

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        scale = {"out": of, "d": of, "scaled_dy": of} if self.scaled else {}
        parts = {"dh_parts": "*fp32", "dB_parts": "*fp32"} | ({"dd_parts": "*fp32"} if self.scaled else {})
        return {"dy": of, **scale, "h": of, "B": of, **parts, "M": "i32", "chunk": "i32"}

    def names(self) -> dict[str, Any]:
        return {**super().names(), "padded": padded(self.rank), "precision": precision(self.dtype), "tiny": TINY}

    def space(self, target: Target) -> Sequence[Config]:
        if self.scaled:
            wide = [Config.of(warps=8, stages=2, BLOCK_M=64)] if target.capability >= 90 else []
            return [*wide, Config.of(warps=8, stages=3, BLOCK_M=32)]
        return [Config.of(warps=8, stages=3, BLOCK_M=64), Config.of(warps=8, stages=3, BLOCK_M=32)]

    def shared(self, config: Config) -> int:
        rows, width, rank = config["BLOCK_M"], self.width, padded(self.rank)
        loop = config.stages * rows * (width * (1 + self.scaled) + rank) + width * rank
        return loop * self.dtype.itemsize + rows * rank * 4

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-self.N // self.width), -(-sizes["M"] // sizes["chunk"]))


@dataclass(frozen=True)
class SumOfParts(Kernel):
    """out = scale * (parts[0] + parts[1] + ...), in float32 and always in this order, for each of a few outputs"""

    scales: tuple[float, ...]
    dtype: torch.dtype

    name = "sum_of_parts"
    applies = "after kernels that split a sum over their programs"
    cpu = "not needed"

    def supports(self) -> str | None:
        return None

    def arguments(self) -> Mapping[str, str]:
        out, each = f"*{triton_type(self.dtype)}", range(len(self.scales))
        tensors = {name + str(i): of for i in each for name, of in (("parts", "*fp32"), ("out", out))}
        return {**tensors, **{f"{name}{i}": "i32" for i in each for name in ("count", "elements")}}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, stages=1, BLOCK=256)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (sum(-(-sizes[f"elements{i}"] // config["BLOCK"]) for i in range(len(self.scales))),)


@plans.kept
def sum_of_parts(scales: tuple[float, ...], dtype: torch.dtype) -> SumOfParts:
    """The kernel that adds up parts."""
    return SumOfParts(scales, dtype)


STEP = 64
"""Rows that a program takes at once, at most."""


@dataclass(frozen=True)
class Split:
    """How dy (M, N) is split: columns and rows of a program."""

    width: int
    chunk: int

    def parts(self, M: int, N: int) -> tuple[int, int]:
        """Blocks of columns, and of rows."""
        return -(-N // self.width), -(-M // self.chunk)

    @classmethod
    def of(cls, M: int, N: int, rank: int, programs: int, scaled: bool = False) -> Split:
        """The split that keeps so many programs busy and stores the fewest parts."""
        splits = (cls._wide(M, N, width, programs) for width in _widths(rank, scaled))
        return min(splits, key=lambda split: split.traffic(M, N, rank))

    @classmethod
    def _wide(cls, M: int, N: int, width: int, programs: int) -> Split:
        splits = max(1, programs // -(-N // width))
        return cls(width, max(-(-M // (splits * STEP)), 1) * STEP)

    def traffic(self, M: int, N: int, rank: int) -> int:
        """Bytes of the parts, written and read."""
        columns, rows = self.parts(M, N)
        return 8 * rank * (M * columns + N * rows)


def _widths(rank: int, scaled: bool) -> list[int]:
    """Columns of a program whose sums and operands fit its registers, the most first."""
    widest = 256 if scaled else 512  # out is read as well as dy
    return [width for width in (512, 256, 128) if width <= widest and width * padded(rank) <= widest * 32]


def kernel_of(dy: Tensor, h: Tensor, B: Tensor, split: Split, scaled: bool = False) -> LowRankGradients:
    """The kernel for matrices dy (M, N), h (M, r) and B (N, r), the elements of a row side by side."""
    return LowRankGradients(
        dy.shape[1], h.shape[1], split.width, row_stride(dy), row_stride(h), row_stride(B), dy.dtype, scaled
    )


LARGE = 4 << 20
"""Bytes of dy from which one read of it is worth two launches; below, products in the L2 cache are as fast."""


def supports(dy: Tensor, h: Tensor, B: Tensor) -> str | None:
    """Why PyTorch's operators are taken instead, or None."""
    return f"dy of {dy.nbytes:,} bytes" if dy.nbytes < LARGE else _unsupported(dy, h, B)


@plans.by_layout
def _unsupported(dy: Tensor, h: Tensor, B: Tensor) -> str | None:
    if reason := unusable(dy.device):
        return reason
    if any(t.dtype != dy.dtype for t in (h, B)):
        return "operands of several dtypes"
    if any(t.shape[1] > 1 and t.stride(1) != 1 for t in (dy, h, B)):
        return "rows with gaps between their elements"
    (M, N), rank = dy.shape, h.shape[1]
    if (reason := kernel_of(dy, h, B, Split(128, STEP)).supports()) is not None:
        return reason
    split = Split.of(M, N, rank, multiprocessors(dy.device))
    if split.traffic(M, N, rank) > WORTH * dy.nbytes:
        return f"rank {rank}: the parts would take {split.traffic(M, N, rank):,} bytes beside a dy of {dy.nbytes:,}"
    return None


WORTH = 0.75
"""Of the bytes that reading at once saves, those that parts of sums may take instead."""


@plans.kept
def too_wide(N: int, rank: int, dtype: torch.dtype) -> str | None:
    """Why the gradients of a branch and its scale should not come from one read of dy and of the output, or None.

    Apart, dy and the output are read for the gradient of d, dy * d is written, and read for either product: five passes
    over (M, N) where a compiler finds dy * d along with the sum.  The kernel reads two and writes one.  What it takes
    instead are parts of dh, float32, written and read, a block of columns each.  Neither depends on M, of which a graph
    has any: where there are few rows, everything is in the L2 cache and two launches are fewer.
    """
    if reason := LowRankGradients(N, rank, 128, N, rank, rank, dtype, scaled=True).supports():
        return reason
    parts, saved = 8 * rank * tiles_of(N, _widths(rank, scaled=True)[0]), 2 * N * dtype.itemsize
    if parts > WORTH * saved:
        return f"rank {rank}: parts of its gradients would take {parts:,} bytes a row to save {saved:,}"
    return None


@plans.by_layout
def unscaled(dy: Tensor, h: Tensor, B: Tensor, out: Tensor, d: Tensor) -> str | None:
    """Why PyTorch's operators compute the gradients of a branch and its scale, or None."""
    if reason := unusable(dy.device):
        return reason
    if any(t.dtype != dy.dtype for t in (h, B, out, d)):
        return "operands of several dtypes"
    return "no rows" if not dy.shape[0] else too_wide(dy.shape[1], h.shape[1], dy.dtype)


@plans.by_layout
def _plan(
    dy: Tensor, h: Tensor, B: Tensor, split: Split | None, scaled: bool = False
) -> tuple[LowRankGradients, Split]:
    (M, N), rank = dy.shape, h.shape[1]
    split = split or Split.of(M, N, rank, multiprocessors(dy.device), scaled)
    return kernel_of(dy, h, B, split, scaled), split


def low_rank_gradients(
    dy: Tensor, h: Tensor, B: Tensor, scale: float, split: Split | None = None
) -> tuple[Tensor, Tensor]:
    """`(scale * dy B, scale * dy' h)` from one read of dy: dy (M, N), h (M, r), B (N, r) -> (M, r), (N, r)."""
    (M, N), rank = dy.shape, h.shape[1]
    kernel, split = _plan(dy, h, B, split)
    columns, rows = split.parts(M, N)
    dh_parts = dy.new_empty(columns, M, rank, dtype=torch.float32)
    dB_parts = dy.new_empty(rows, N, rank, dtype=torch.float32)
    kernel.launch(dy, h, B, dh_parts, dB_parts, M=M, chunk=split.chunk)
    dh, dB = dy.new_empty(M, rank), dy.new_empty(N, rank)
    sum_of_parts((scale, scale), dy.dtype).launch(
        dh_parts, dh, dB_parts, dB, count0=columns, elements0=M * rank, count1=rows, elements1=N * rank
    )
    return dh, dB


def scaled_gradients(
    dy: Tensor, out: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor, split: Split | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, h, B and d in `out = (y + scale * h B') * d` from one read of dy and of out (M, N)."""
    (M, N), rank = dy.shape, h.shape[1]
    dy, h, B = (t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous() for t in (dy, h, B))
    kernel, split = _plan(dy, h, B, split, True)
    columns, rows = split.parts(M, N)
    sizes, counts = ((M, rank), (N, rank), (N,)), (columns, rows, rows)
    parts = [dy.new_empty(count, *size, dtype=torch.float32) for count, size in zip(counts, sizes, strict=True)]
    scaled, *sums = (dy.new_empty(size) for size in ((M, N), *sizes))
    kernel.launch(dy, out.contiguous(), d.contiguous(), scaled, h, B, *parts, M=M, chunk=split.chunk)
    lengths = {
        f"{name}{i}": n for i, t in enumerate(parts) for name, n in (("count", len(t)), ("elements", sums[i].numel()))
    }
    pairs = [t for pair in zip(parts, sums, strict=True) for t in pair]
    sum_of_parts((scale, scale, 1.0), dy.dtype).launch(*pairs, config=None, **lengths)
    dh, dB, dd = sums
    return scaled, dh, dB, dd


EXAMPLES = (
    *(
        LowRankGradients(N, rank, Split.of(8192, N, rank, 132).width, N, rank, rank, torch.bfloat16)
        for N, rank in ((1024, 16), (4096, 8), (4096, 32), (14336, 16), (14336, 64))
    ),
    LowRankGradients(1024, 16, 256, 6144, 48, 16, torch.float16),  # a slice of dy of fused q, k and v
    *(
        LowRankGradients(N, rank, Split.of(8192, N, rank, 132, True).width, N, rank, rank, torch.bfloat16, scaled=True)
        for N, rank in ((1024, 16), (4096, 8), (4096, 32), (14336, 48))
    ),
    SumOfParts((2.0, 2.0), torch.bfloat16),
    SumOfParts((2.0, 2.0, 1.0), torch.bfloat16),
    SumOfParts((1.0,), torch.bfloat16),
)
