"""Row norms of an adapted weight on a GPU: one pass over the frozen weight, and nothing of its size is formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen import nf4, storage
from rewrite.codegen.kernels.kernel import Config, Kernel, precision, triton_type
from rewrite.codegen.kernels.nf4 import stored_types, unreadable
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
FULL = 120
"""Programs that keep a GPU busy: about one for each multiprocessor of the targets (108, 132)."""


@dataclass(frozen=True)
class RowNorms(Kernel):
    """norm_n = |W_n + s (B A)_n|, from |W|^2 + 2 s <W A', B> + s^2 <B (A A'), B> row by row

    `row` is from row to row of W.  With a `blocksize`, W is stored as NF4 and decoded on its way, to `dtype`.
    """

    N: int
    K: int
    rank: int
    scale: float
    row: int
    dtype: torch.dtype
    blocksize: int = 0
    nested: bool = False

    name = "row_norms"
    applies = "DoRA: the norms of every step"
    cpu = "ATen: a product with A', and sums"

    @property
    def padded(self) -> int:
        """The rank as `tl.dot` takes it."""
        return max(16, 1 << (self.rank - 1).bit_length())

    def supports(self) -> str | None:
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{str(self.dtype).removeprefix('torch.')} has no product on tensor cores"
        if self.rank > 64:
            return f"rank {self.rank}, more than 64: A A' does not fit beside the products"
        if 0 in (self.N, self.K, self.rank):
            return "an empty matrix"
        if self.blocksize and self.K % self.blocksize:
            return f"rows of {self.K} weights are not made of whole blocks of {self.blocksize}"
        return None

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        weight = stored_types(self.nested) if self.blocksize else {"weight": of}
        return {**weight, "A": of, "B": of, "out": "*fp32"}

    def names(self) -> dict[str, Any]:
        weight = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}.get(self.dtype, "tl.float32")
        return {**super().names(), "precision": precision(self.dtype), "weight_dtype": weight, "code": nf4.CODE}

    def space(self, target: Target) -> Sequence[Config]:
        tall = [Config.of(warps=4, stages=4, BLOCK_N=32, BLOCK_K=128)]
        short = [Config.of(warps=4, stages=4, BLOCK_N=16, BLOCK_K=128)]
        small = [Config.of(warps=4, stages=3, BLOCK_N=16, BLOCK_K=64)]
        fits = self.padded <= 32 and self.dtype.itemsize == 2  # the sums of tall tiles stay in registers
        return tall + short + small if fits else short + small

    def shared(self, config: Config) -> int:
        return (config["BLOCK_N"] + self.padded) * config["BLOCK_K"] * config.stages * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-self.N // config["BLOCK_N"]),)

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        """Tall tiles read A less often; short ones make enough programs of a short matrix."""
        return next((c for c in configs if self.grid(c)[0] >= FULL), configs[-1])


def kernel_of(weight: Sequence[Tensor], layout: str, A: Tensor, scale: float) -> RowNorms | str:
    """The kernel for W (N, K), as stored tensors of `layout`, and A (r, K); or why there is none."""
    if reason := unusable(weight[0].device):
        return reason
    if layout == "dense":
        (W,) = weight
        if W.ndim != 2 or W.stride(-1) != 1:
            return "a weight whose rows have gaps"
        N, K = W.shape
        kernel = RowNorms(N, K, A.shape[0], scale, W.stride(0), W.dtype)
        return kernel.supports() or kernel
    known = storage.layout(layout)
    if not isinstance(known, storage.Nf4) or len(known.shape) != 2:
        return f"a weight that is stored as {layout}"
    N, K = known.shape
    stored = known.blocksize, len(weight) > 2
    kernel = RowNorms(N, K, A.shape[0], scale, K, known.dtype, *stored)
    return unreadable(weight, N * K, known.blocksize) or kernel.supports() or kernel


def row_norms(kernel: RowNorms, weight: Sequence[Tensor], A: Tensor, B: Tensor) -> Tensor:
    """Launch: W (N, K) as it is stored, A (r, K), B (N, r) cast to W's dtype -> (N,) float32."""
    out = torch.empty(kernel.N, dtype=torch.float32, device=A.device)
    A, B = A.to(kernel.dtype).contiguous(), B.to(kernel.dtype).contiguous()
    kernel.launch(*weight, A, B, out)
    return out


EXAMPLES = (
    RowNorms(4096, 4096, 16, 2.0, 4096, torch.bfloat16),
    RowNorms(1024, 4096, 64, 1.0, 4096, torch.bfloat16),
    RowNorms(4096, 14336, 16, 2.0, 14336, torch.float32),
    RowNorms(4096, 4096, 16, 2.0, 4096, torch.bfloat16, 64, True),
)
