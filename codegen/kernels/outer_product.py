"""Products that sum over the rows of two matrices on a GPU, for small results: gradients of slices and of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels import plans
from rewrite.codegen.kernels.gradients import LARGE, sum_of_parts
from rewrite.codegen.kernels.kernel import Config, Kernel, precision, triton_type
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
FULL = 264
"""Programs that keep a GPU busy while each waits for memory: about two for each multiprocessor of the targets."""


@dataclass(frozen=True)
class OuterProduct(Kernel):
    """out = h' x, summed over all rows in a fixed order; where gates are given, over the rows that they open

    h (M, R) and x (M, N) are `h_row` and `x_row` from row to row: slices are read where they lie.  `parts` of the rows
    are summed by programs of their own, in float32 where there are several.
    """

    R: int
    N: int
    rows: int
    ranks: int
    h_row: int
    x_row: int
    transposed: bool
    dtype: torch.dtype
    gate_row: int = 0
    gate: torch.dtype | None = None
    parts: int = 1

    name = "outer_product"
    applies = "gradients of segmented adapters and of slices of a weight, up to 128 columns"
    cpu = "ATen: mm of the views"

    @property
    def gated(self) -> bool:
        return self.gate is not None

    def supports(self) -> str | None:
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{str(self.dtype).removeprefix('torch.')} has no product on tensor cores"
        if self.gate is None and self.dtype == torch.float32:
            return "float32: cuBLAS is faster"
        if self.gate is None and self.R > 128:
            return f"{self.R} columns, more than 128: cuBLAS has tiles enough, and takes strided views as they are"
        if 0 in (self.R, self.N):
            return "an empty matrix"
        return None

    def names(self) -> dict[str, Any]:
        return {**super().names(), "gated": self.gated, "precision": precision(self.dtype)}

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        gate = {"gate": f"*{triton_type(self.gate)}", "tiles": "*i8"} if self.gate else {}
        sizes = {"M": "i32", **({"T": "i32"} if self.gate else {}), "LENGTH": "i32"}
        return {"h": of, "x": of, **gate, "out": "*fp32" if self.parts > 1 else of, **sizes}

    def space(self, target: Target) -> Sequence[Config]:
        wide = [Config.of(warps=4, stages=3, BLOCK_N=128)] if target.capability >= 90 or not self.gated else []
        return [*wide, Config.of(warps=4, stages=3, BLOCK_N=64)]  # gates and wide tiles spill on sm_80

    def shared(self, config: Config) -> int:
        return (self.ranks + config["BLOCK_N"]) * self.rows * config.stages * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return -(-self.R // self.ranks), -(-self.N // config["BLOCK_N"]), self.parts

    @classmethod
    def of(
        cls, h: Tensor, x: Tensor, tiles: tuple[int, int], gate: Tensor | None = None, transposed: bool = False
    ) -> OuterProduct:
        """The kernel for h (M, R) and x (M, N) as they lie in memory, in `tiles` of (rows, ranks)."""
        (M, R), N, (rows, ranks) = h.shape, x.shape[1], tiles
        programs = -(-R // ranks) * -(-N // 128)
        parts = max(1, min(16, FULL // max(programs, 1), M // (4 * rows)))  # by shapes: the order of a sum is fixed
        parts = 1 << (parts.bit_length() - 1)
        gates = (0, None) if gate is None else (gate.stride(0), gate.dtype)
        return cls(R, N, rows, ranks, h.stride(0), x.stride(0), transposed, x.dtype, *gates, parts)

    def compute(
        self, h: Tensor, x: Tensor, gate: Tensor | None = None, tiles: Tensor | None = None, T: int = 1
    ) -> Tensor:
        """(R, N), or (N, R) where transposed; gates with their open tiles, T rows for each."""
        M, shape = h.shape[0], (self.N, self.R) if self.transposed else (self.R, self.N)
        length = -(-M // (self.parts * self.rows)) * self.rows
        wide = torch.float32 if self.parts > 1 else x.dtype
        out = torch.empty(self.parts, *shape, dtype=wide, device=x.device)
        if self.gated:
            self.launch(h, x, gate, tiles, out, M=M, T=T, LENGTH=length)
        else:
            self.launch(h, x, out, M=M, LENGTH=length)
        if self.parts == 1:
            return out[0]
        whole = torch.empty(shape, dtype=x.dtype, device=x.device)
        sum_of_parts((1.0,), x.dtype).launch(out, whole, count0=self.parts, elements0=whole.numel())
        return whole


@plans.by_layout
def of_slice(dy: Tensor, h: Tensor) -> OuterProduct | str:
    """The kernel of `dy' h`, (N, c), for matrices dy (M, N) and h (M, c), a slice of wider rows; or why there is none.

    Few columns make few tiles: a library's product, which has one program for each, keeps a part of the GPU busy, and
    reads dy at that part of the speed of memory.  With more columns, or dy in the L2 cache, it is as fast or faster.
    """
    if reason := unusable(dy.device):
        return reason
    if any(t.shape[1] > 1 and t.stride(1) != 1 for t in (dy, h)) or h.dtype != dy.dtype:
        return "rows with gaps between their elements, or operands of several dtypes"
    if dy.nbytes < LARGE:
        return f"dy of {dy.nbytes:,} bytes, which the L2 cache holds"
    kernel = OuterProduct.of(h, dy, (64, min(64, max(16, 1 << (h.shape[1] - 1).bit_length()))), transposed=True)
    return kernel.supports() or kernel


EXAMPLES = (
    OuterProduct(192, 4096, 64, 32, 192, 4096, False, torch.bfloat16, 192, torch.bfloat16),
    OuterProduct(192, 14336, 64, 32, 576, 14336, False, torch.bfloat16, 192, torch.float32, 2),
    OuterProduct(128, 4096, 64, 64, 4096, 4096, True, torch.bfloat16, parts=4),
)
