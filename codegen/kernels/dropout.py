"""Dropout on a GPU, its mask computed from the seed where it is needed: the down-projections, and their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen import masks
from rewrite.codegen.kernels import plans
from rewrite.codegen.kernels.gradients import sum_of_parts
from rewrite.codegen.kernels.kernel import Config, Kernel, precision, triton_type
from rewrite.codegen.kernels.products import HALVES, NARROW, padded, row_stride
from rewrite.codegen.kernels.target import Target, multiprocessors, unusable

Tensor = torch.Tensor


@dataclass(frozen=True)
class Factor:
    """One of the factors that share x: its rows of the stacked A, and of 2**16 numbers how many drop an element."""

    index: int
    offset: int
    rank: int
    p: float

    @property
    def padded(self) -> int:
        return padded(self.rank)

    @property
    def threshold(self) -> int:
        return masks.threshold(self.p)

    @property
    def scale(self) -> float:
        return masks.scale(self.p)


def factors_of(ranks: Sequence[int], p: Sequence[float]) -> Iterator[Factor]:
    """The factors of a stacked A, by their ranks and probabilities."""
    offsets = itertools.accumulate(ranks, initial=0)
    for index, (offset, rank, pi) in enumerate(zip(offsets, ranks, p, strict=False)):
        yield Factor(index, offset, rank, pi)


@dataclass(frozen=True)
class _Dropped(Kernel):
    """What the kernels of factors that share x have in common."""

    K: int
    factors: tuple[Factor, ...]
    dtype: torch.dtype

    products = True
    cpu = "masks in C++, codegen/cpu; products of ATen"

    def supports(self) -> str | None:
        if self.dtype not in HALVES:
            return f"{str(self.dtype).removeprefix('torch.')}: cuBLAS is faster"
        if any(f.rank == 0 for f in self.factors) or sum(f.padded for f in self.factors) > NARROW:
            return f"ranks {', '.join(str(f.rank) for f in self.factors)}: not in 1 ... {NARROW} together"
        return None

    def names(self) -> dict[str, Any]:
        total = sum(f.rank for f in self.factors)
        here = {"total": total, "rounds": masks.ROUNDS, "even": math.gcd(self.K, 16)}
        return {**super().names(), **here, "precision": precision(self.dtype)}

    @property
    def low(self) -> int:
        """The ranks as they are padded, together."""
        return sum(f.padded for f in self.factors)


@dataclass(frozen=True)
class DroppedLinear(_Dropped):
    """h_i = scale_i * (keep_i * x) A_i' for factors that share x, which is read once

    A program has some rows and a chunk of the columns of x; where there are several chunks, it stores a part.
    """

    x_row: int
    split: bool

    name = "dropped_linear"
    applies = "down-projections behind dropout"

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        out = "*fp32" if self.split else of
        return {"x": of, "A": of, "seed": "*i64", "out": out, "M": "i32", "chunk": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [
            Config.of(warps=4, stages=3, BLOCK_M=64, BLOCK_K=64),
            Config.of(warps=8, stages=3, BLOCK_M=64, BLOCK_K=128),
        ]

    def shared(self, config: Config) -> int:
        m, k = config["BLOCK_M"], config["BLOCK_K"]
        return (config.stages * (m + self.low) * k + m * k) * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["M"] // config["BLOCK_M"]), -(-self.K // sizes["chunk"]))


@dataclass(frozen=True)
class DroppedGradient(_Dropped):
    """dA_parts[j] = scale_i * dh_i' (keep_i * x) for the blocks of rows j of x, which is read once"""

    x_row: int
    dh_row: int

    name = "dropped_gradient"
    applies = "dA of down-projections behind dropout"

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        return {"dh": of, "x": of, "seed": "*i64", "parts": "*fp32", "M": "i32", "chunk": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [
            Config.of(warps=4, stages=3, BLOCK_M=64, BLOCK_K=128),
            Config.of(warps=4, stages=3, BLOCK_M=32, BLOCK_K=128),
        ]

    def shared(self, config: Config) -> int:
        m, k = config["BLOCK_M"], config["BLOCK_K"]
        return (config.stages * (k + self.low) * m + k * m) * self.dtype.itemsize

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-self.K // config["BLOCK_K"]), -(-sizes["M"] // sizes["chunk"]))


@dataclass(frozen=True)
class DroppedInputGradient(_Dropped):
    """dx = sum of keep_i * scale_i * dh_i A_i, or dx += that, in place"""

    dh_row: int
    add: bool

    name = "dropped_input_gradient"
    applies = "dx of down-projections behind dropout, added in place to that of the base product"

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        return {"dh": of, "A": of, "seed": "*i64", "dx": of, "M": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [
            Config.of(warps=4, stages=1, BLOCK_M=64, BLOCK_K=64),
            Config.of(warps=8, stages=1, BLOCK_M=64, BLOCK_K=128),
        ]

    def shared(self, config: Config) -> int:
        m, k, low = config["BLOCK_M"], config["BLOCK_K"], max(f.padded for f in self.factors)
        return max((m + k) * low * self.dtype.itemsize, 4 * m * k)

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["M"] // config["BLOCK_M"]), -(-self.K // config["BLOCK_K"]))


@dataclass(frozen=True)
class Dropout(Kernel):
    """y = keep * x * scale"""

    K: int
    p: float
    x_row: int
    dtype: torch.dtype

    name = "dropout"
    applies = "dropout, and its gradient"
    cpu = "C++, codegen/cpu"

    def supports(self) -> str | None:
        return None if self.dtype in _FLOATS else f"{self.dtype}: the reference"

    def names(self) -> dict[str, Any]:
        threshold, scale = masks.threshold(self.p), masks.scale(self.p)
        return {**super().names(), "rounds": masks.ROUNDS, "threshold": threshold, "scale": scale}

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        return {"x": of, "seed": "*i64", "out": of, "M": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, stages=1, BLOCK_M=8, BLOCK_K=512)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["M"] // config["BLOCK_M"]), -(-self.K // config["BLOCK_K"]))


_FLOATS = (*HALVES, torch.float32)
STEP = 128
"""Columns of x in a chunk are a multiple of this, rows of half of it."""
RESIDENT = 4
"""Programs for each multiprocessor: Philox keeps its arithmetic busy where 16 warps take turns."""


def supports_dropout(x: Tensor, p: float) -> str | None:
    """Why the reference drops elements of a matrix x, or None."""
    return unusable(x.device) or _dropout(x, p).supports()


@plans.by_layout
def _dropout(x: Tensor, p: float) -> Dropout:
    return Dropout(x.shape[1], p, row_stride(x), x.dtype)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """`keep * x * scale` of a matrix x, the elements of a row side by side."""
    out = x.new_empty(x.shape)
    _dropout(x, p).launch(x, seed, out, M=x.shape[0])
    return out


@plans.by_layout
def supports(x: Tensor, A: Tensor, ranks: Sequence[int], p: Sequence[float]) -> str | None:
    """Why the references are taken for factors A (sum of ranks, K) that share a matrix x (M, K), or None."""
    if reason := unusable(x.device):
        return reason
    if A.dtype != x.dtype or not A.is_contiguous() or (x.shape[1] > 1 and x.stride(1) != 1):
        return "operands of several dtypes, or rows with gaps between their elements"
    return DroppedLinear(x.shape[1], tuple(factors_of(ranks, p)), x.dtype, row_stride(x), False).supports()


def linear(
    x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float], chunk: int | None = None
) -> Tensor:
    """`h = [scale_i * (keep_i * x) A_i']`: x (M, K), A (sum of ranks, K), seed (n,) -> (M, sum of ranks)."""
    M, total = x.shape[0], A.shape[0]
    kernel, chunk, parts = _linear(x, ranks, p, chunk)
    h = x.new_empty(M, total)
    out = x.new_empty(parts, M, total, dtype=torch.float32) if parts > 1 else h
    kernel.launch(x, A, seed, out, M=M, chunk=chunk)
    if parts > 1:
        sum_of_parts((1.0,), x.dtype).launch(out, h, count0=parts, elements0=M * total)
    return h


@plans.by_layout
def _linear(x: Tensor, ranks: Sequence[int], p: Sequence[float], chunk: int | None) -> tuple[DroppedLinear, int, int]:
    """The kernel for a matrix x, columns of a chunk, and how many chunks there are."""
    M, K = x.shape
    if chunk is None:
        chunk = _chunk(K, STEP, RESIDENT * multiprocessors(x.device) // max(-(-M // 64), 1))
    parts = max(-(-K // chunk), 1)
    return DroppedLinear(K, tuple(factors_of(ranks, p)), x.dtype, row_stride(x), parts > 1), chunk, parts


def _chunk(size: int, step: int, splits: int) -> int:
    """So many elements of `size` for each of the splits, a multiple of `step`."""
    return max(-(-size // (max(splits, 1) * step)), 1) * step


def gradient(
    dh: Tensor, x: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float], chunk: int | None = None
) -> Tensor:
    """`dA = [scale_i * dh_i' (keep_i * x)]`: dh (M, sum of ranks), x (M, K) -> (sum of ranks, K)."""
    (M, K), total = x.shape, dh.shape[1]
    kernel, chunk, parts = _gradient(dh, x, ranks, p, chunk)
    sums = x.new_empty(parts, total, K, dtype=torch.float32)
    dA = x.new_empty(total, K)
    if M == 0:
        return dA.zero_()
    kernel.launch(dh, x, seed, sums, M=M, chunk=chunk)
    sum_of_parts((1.0,), x.dtype).launch(sums, dA, count0=parts, elements0=total * K)
    return dA


@plans.by_layout
def _gradient(
    dh: Tensor, x: Tensor, ranks: Sequence[int], p: Sequence[float], chunk: int | None
) -> tuple[DroppedGradient, int, int]:
    """The kernel for matrices dh and x, rows of a chunk, and how many chunks there are."""
    M, K = x.shape
    if chunk is None:
        chunk = _chunk(M, STEP // 2, RESIDENT * multiprocessors(x.device) // max(-(-K // STEP), 1))
    kernel = DroppedGradient(K, tuple(factors_of(ranks, p)), x.dtype, row_stride(x), row_stride(dh))
    return kernel, chunk, max(-(-M // chunk), 1)


def input_gradient(
    dh: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float], dx: Tensor, add: bool
) -> None:
    """Store `sum of keep_i * scale_i * dh_i A_i` in dx (M, K), contiguous, or add it to what dx holds."""
    _input_gradient(dh, dx, ranks, p, add).launch(dh, A, seed, dx, M=dx.shape[0])


@plans.by_layout
def _input_gradient(
    dh: Tensor, dx: Tensor, ranks: Sequence[int], p: Sequence[float], add: bool
) -> DroppedInputGradient:
    return DroppedInputGradient(dx.shape[1], tuple(factors_of(ranks, p)), dx.dtype, row_stride(dh), add)


def _examples() -> Iterator[Kernel]:
    bf16 = torch.bfloat16
    for ranks, p in (((16,), (0.05,)), ((16, 16, 16), (0.05, 0.05, 0.05)), ((8, 64), (0.1, 0.0))):
        factors, total = tuple(factors_of(ranks, p)), sum(ranks)
        yield DroppedLinear(4096, factors, bf16, 4096, len(ranks) == 2)
        yield DroppedGradient(4096, factors, bf16, 4096, total)
        yield DroppedInputGradient(4096, factors, bf16, total, len(ranks) != 2)
    yield Dropout(4096, 0.05, 4096, bf16)
    yield Dropout(4096, 0.1, 4096, torch.float32)


EXAMPLES = tuple(_examples())
