"""Sums of products on a GPU in one pass over the output: a base product and its branches, or several products."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels.kernel import Config, Kernel, precision, triton_type
from rewrite.codegen.kernels.target import Target

NARROW = 128
"""The longest contraction that is one step of `tl.dot`; what is longer is a loop."""
HALVES = torch.bfloat16, torch.float16
TINY = 2.0**-64
"""What stands for a factor of 0: the sum is next to nothing then, and can still be had back from the output."""


@dataclass(frozen=True)
class Term:
    """One product a b: a (M, size) with elements of a row side by side, b (size, columns) with one stride 1.

    It stands in the columns `start : start + width` of the output, in all of them where the width is 0.
    """

    size: int
    a_row: int
    b_row: int
    b_column: int
    scale: float = 1.0
    start: int = 0
    width: int = 0

    @property
    def padded(self) -> int:
        return padded(self.size)

    def columns(self, N: int) -> int:
        return self.width or N

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, start: int = 0, width: int = 0) -> Term:
        """The term of a matrix a (M, size) and a matrix b (size, columns), as they lie in memory."""
        return cls(a.shape[1], row_stride(a), *b.stride(), scale=scale, start=start, width=width)


def horner(terms: Sequence[Term]) -> list[float]:
    """By what one accumulator is multiplied after each of the terms, so that each of them gets its scale in the end."""
    return [scale / after for scale, after in itertools.pairwise([*(term.scale for term in terms), 1.0])]


def padded(rank: int) -> int:
    """A rank as `tl.dot` takes it: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def row_stride(a: torch.Tensor) -> int:
    """From row to row of a matrix; one row has none, whatever its stride says."""
    return a.stride(0) if a.shape[0] > 1 else a.shape[1]


@dataclass(frozen=True)
class SumOfProducts(Kernel):
    """y = (a_0 b_0 + scale_1 a_1 b_1 + ... + given) * factor + bias, summed in float32 and rounded once

    Short contractions (the ranks of branches) come first and fill the accumulator, then the long ones run as loops;
    `given` (M, N) is a sum so far, `factor` (N,) that of each column.
    """

    N: int
    terms: tuple[Term, ...]
    bias: bool
    dtype: torch.dtype
    given: bool = False
    factor: bool = False

    name = "sum_of_products"
    applies = "adapted layers and their input gradients, where one pass over the output beats cuBLAS and addmm_"
    cpu = "ATen: mm, then addmm_ in place"
    products = True

    def supports(self) -> str | None:
        if self.dtype not in HALVES:
            return f"{str(self.dtype).removeprefix('torch.')}: cuBLAS is faster"
        for term in self.terms:
            if 0 in (term.size, self.N) or term.scale == 0.0:
                return "a product that is zero"
            if 1 not in (term.b_row, term.b_column):
                return "a second operand whose rows and columns both have gaps"
            if max(term.b_row, 1) * term.size >= 2**31 or max(term.b_column, 1) * self.N >= 2**31:
                return "a second operand of 2**31 elements and more"
            if term.size > NARROW and (term.scale != 1.0 or term.columns(self.N) != self.N):
                return f"a branch of rank {term.size}, more than {NARROW}"
        return None

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        operands = {f"{name}{i}": of for i in range(len(self.terms)) for name in "ab"}
        optional = dict.fromkeys((name for name in ("given", "factor", "bias") if getattr(self, name)), of)
        return {**operands, **optional, "out": of, **dict.fromkeys(self.lengths, "i32"), "M": "i32"}

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of the loops, which are arguments of the kernel."""
        return {f"size_{i}": term.size for i, term in enumerate(self.terms) if term.size > NARROW}

    def names(self) -> dict[str, Any]:
        indexed = list(enumerate(self.terms))
        narrow = [(i, term) for i, term in indexed if term.size <= NARROW]
        wide = [(i, term) for i, term in indexed if term.size > NARROW]
        ratios = dict(zip((i for i, _ in narrow), horner([term for _, term in narrow]), strict=True))
        terms = {"narrow": narrow, "wide": wide, "ratios": ratios}
        return {**super().names(), **terms, "precision": precision(self.dtype), "tiny": TINY}

    def space(self, target: Target) -> Sequence[Config]:
        if not self.lengths:  # a pass over memory
            return [Config.of(4, 1, BLOCK_M=64, BLOCK_N=128), Config.of(4, 1, BLOCK_M=32, BLOCK_N=64)]
        if target.capability >= 90:
            return [
                Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64),
                Config.of(warps=8, stages=4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
                Config.of(warps=4, stages=4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
                Config.of(warps=4, stages=4, BLOCK_M=32, BLOCK_N=64, BLOCK_K=128),
            ]
        return [
            Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            Config.of(warps=4, stages=3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            Config.of(warps=4, stages=3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=128),
        ]

    def shared(self, config: Config) -> int:
        m, n = config["BLOCK_M"], config["BLOCK_N"]
        loop = (m + n) * config["BLOCK_K"] * config.stages if self.lengths else 0
        branch = max((m + n) * term.padded if term.size <= NARROW else 0 for term in self.terms)
        return max(loop + branch, m * n) * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["M"] // config["BLOCK_M"]) * -(-self.N // config["BLOCK_N"]),)

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        """The largest tile of which there are enough to fill a GPU."""
        return next((c for c in configs if self.grid(c, **sizes)[0] >= FULL), configs[-1])


FULL = 120
"""Programs that keep a GPU busy: about one for each multiprocessor of the targets (108, 132)."""


def _examples() -> tuple[SumOfProducts, ...]:
    bf16 = torch.bfloat16
    base = Term(4096, 4096, 1, 4096)
    half = Term(4096, 4096, 1, 4096)
    kv = Term(1024, 1024, 4096, 1)
    return (
        SumOfProducts(1024, (base, Term(16, 16, 1, 16, scale=2.0)), False, bf16),  # x W' + s h B', 4096 -> 1024
        SumOfProducts(4096, (base, Term(64, 64, 1, 64, scale=0.5)), True, bf16),
        SumOfProducts(  # q, k and v fused in one weight
            6144,
            (base, *(Term(8, 24, 1, 8, 2.0, start, width) for start, width in ((0, 4096), (4096, 1024), (5120, 1024)))),
            False,
            bf16,
        ),
        SumOfProducts(1024, (half, Term(16, 16, 1, 16, scale=2.0)), False, torch.float16),
        SumOfProducts(4096, (kv, kv, Term(32, 32, 4096, 1)), False, bf16),  # dx of k and v: dy W + dh A
        *(
            SumOfProducts(N, (Term(rank, rank, 1, rank, 2.0),), False, bf16, given=True, factor=True)
            for N, rank in ((4096, 16), (1024, 48))
        ),
    )


EXAMPLES = _examples()
