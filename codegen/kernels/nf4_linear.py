"""Products with NF4 weights of few rows on a GPU: tiles of the weight are decoded on their way to the tensor cores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen import nf4, storage
from rewrite.codegen.kernels import plans, tune
from rewrite.codegen.kernels.gradients import sum_of_parts
from rewrite.codegen.kernels.kernel import Config, Kernel, triton_type
from rewrite.codegen.kernels.nf4 import stored_types, unreadable
from rewrite.codegen.kernels.products import HALVES, NARROW, Term, horner
from rewrite.codegen.kernels.target import Target, multiprocessors, of_device, unusable

Tensor = torch.Tensor

SURELY_FUSED_ROWS, FUSED_ROWS, TIMED_ROWS = 32, 256, 1024
"""Rows up to which a product decodes as it goes: whatever is timed, where nothing is, and where that is faster.

Every 128 rows decode the weight again, at nine instructions an element; once, and read by cuBLAS, it costs the writing
and reading of two bytes an element.  Counted for an H100, the two meet between 256 and 1024 rows.
"""
CHUNK = 128
"""A sum is split at multiples of so many terms, whatever the tiles are."""
DECODED, TRAFFIC, LAUNCH = 2.4e10, 4e12, 2e-6
"""Of an H100: weights that a multiprocessor decodes, bytes to and from the L2 cache, a second; seconds of a launch."""


@dataclass(frozen=True)
class Nf4Linear(Kernel):
    """y = x W' + sum of scale h B' + bias, or dx = dy W; W = CODE[codes] * absmax of its block, as it is decoded whole

    Summed in float32.  `splits` parts of the sum are computed by programs of their own, and left for another kernel.
    """

    N: int
    K: int
    blocksize: int
    nested: bool
    gradient: bool
    dtype: torch.dtype
    weight: torch.dtype
    bias: bool = False
    terms: tuple[Term, ...] = ()
    splits: int = 1

    name = "nf4_linear"
    applies = f"NF4 layers of up to {FUSED_ROWS} rows, forward and input gradient"
    cpu = "C++, codegen/cpu"
    products = True
    fp_fusion = False  # nested scales: a product and a sum, rounded one after the other

    def supports(self) -> str | None:
        if self.dtype not in HALVES:
            return f"{str(self.dtype).removeprefix('torch.')} products: the weight is decoded whole"
        if self.K % self.blocksize:
            return f"rows of {self.K} weights are not made of whole blocks of {self.blocksize}"
        if self.N * self.K >= 2**32 or 0 in (self.N, self.K):
            return f"{self.N} x {self.K} weights"
        if any(term.scale == 0.0 or term.size == 0 for term in self.terms):
            return "a branch that is zero"
        if any(term.size > NARROW for term in self.terms):
            return f"a branch of rank {max(term.size for term in self.terms)}, more than {NARROW}"
        return None

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.K if self.gradient else self.N

    @property
    def length(self) -> int:
        """Terms of its sums."""
        return self.N if self.gradient else self.K

    def names(self) -> dict[str, Any]:
        weight = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}.get(self.weight, "tl.float32")
        here = {"weight_dtype": weight, "code": nf4.CODE, "chunk": CHUNK, "ratios": horner(self.terms)}
        return {**super().names(), **here}

    def arguments(self) -> Mapping[str, str]:
        of = f"*{triton_type(self.dtype)}"
        return {
            "x": of,
            **stored_types(self.nested),
            **({"bias": of} if self.bias else {}),
            **{f"{name}{i}": of for i in range(len(self.terms)) for name in "hB"},
            "out": "*fp32" if self.splits > 1 else of,
            "M": "i32",
            "chunks": "i32",
        }

    def space(self, target: Target) -> Sequence[Config]:
        few = {"BLOCK_OUT": 128, "BLOCK_SUM": 64} if self.gradient else {"BLOCK_OUT": 64, "BLOCK_SUM": 128}
        return [
            Config.of(warps=4, stages=4, BLOCK_M=16, **few),
            Config.of(warps=4, stages=4, BLOCK_M=32, **few),
            Config.of(warps=8, stages=4, BLOCK_M=64, BLOCK_OUT=128, BLOCK_SUM=64),
            Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_OUT=128, BLOCK_SUM=64),
        ]

    def shared(self, config: Config) -> int:
        m, out, length = config["BLOCK_M"], config["BLOCK_OUT"], config["BLOCK_SUM"]
        return config.stages * (2 * m * length + out * length // 2) + 2 * out * length

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-self.width // config["BLOCK_OUT"]), -(-sizes["M"] // config["BLOCK_M"]), self.splits)

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        """The least rows that hold all of M, or the most that there are."""
        return min(configs, key=lambda c: (-(-sizes["M"] // c["BLOCK_M"]), c["BLOCK_M"]))


@dataclass(frozen=True)
class Planned:
    """What one layout of the tensors decides: the kernel, its sums split where there are too few tiles for the device.

    `chunks` are those of a part of the sums, `shape` is that of the result.
    """

    kernel: Nf4Linear
    chunks: int
    M: int
    shape: tuple[int, ...]

    def fused(self, x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor]) -> Tensor:
        """The product by the kernel, `extra` as `_operands` has them."""
        out, kernel = x.new_empty(self.shape), self.kernel
        if not self.M:
            return out
        x = x.contiguous()
        if kernel.splits == 1:
            kernel.launch(x, *weight, *extra, out, M=self.M, chunks=self.chunks)
            return out
        parts = x.new_empty(kernel.splits, self.M, kernel.width, dtype=torch.float32)
        kernel.launch(x, *weight, *extra, parts, M=self.M, chunks=self.chunks)
        sum_of_parts((1.0,), x.dtype).launch(parts, out, count0=kernel.splits, elements0=self.M * kernel.width)
        return out

    def faster(self, x: Tensor, fused: Callable[[], Tensor], whole: Callable[[], Tensor]) -> Tensor:
        """By the kernel, or after decoding the whole weight: what is expected, or was timed, to be faster."""
        ways = {"fused": fused, "whole": whole}
        chosen = "fused" if self.M <= FUSED_ROWS else "whole"
        if self.M > SURELY_FUSED_ROWS and x.is_cuda and tune.wanted():
            key = self.kernel, x.device, self.M.bit_length()
            chosen = tune.fastest(key, list(ways), lambda way: ways[way](), chosen)
        return ways[chosen]()


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
    """`x W' + bias + sum of scale * h B'`, (..., d_out), decoding tiles of W on their way; or why that is not done."""
    if reason := _too_long(x, layout):
        return reason
    planned = _product(x, weight, layout, *rest)
    if isinstance(planned, str):
        return planned
    bias, h, B, *_ = rest

    def whole() -> Tensor:
        w = storage.layout(layout).decode(*weight).to(x.dtype)
        return torch.ops.rewrite.adapted_linear_core(x, [w], "dense", *rest)

    return planned.faster(x, lambda: planned.fused(x, weight, _operands(bias, h, B)), whole)


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
    """`dy W`, (..., d_in), decoding tiles of W on their way; or why that is not done."""
    if reason := _too_long(dy, layout):
        return reason
    planned = _gradient(dy, weight, layout)
    if isinstance(planned, str):
        return planned

    def whole() -> Tensor:
        return torch.matmul(dy, storage.layout(layout).decode(*weight).to(dy.dtype))

    return planned.faster(dy, lambda: planned.fused(dy, weight, []), whole)


def route() -> str:
    """What computes with NF4 weights on a GPU, and why it is not kernels where it is not: a line."""
    if reason := unusable(torch.device("cuda")):
        return f"PyTorch operators, no Triton kernels: {reason}"
    return (
        f"Triton kernels; products in 16 bits of up to {FUSED_ROWS} rows decode as they go, "
        "where rows of the weight are made of whole blocks"
    )


def _too_long(x: Tensor, layout: str) -> str | None:
    if not layout.startswith("nf4:"):
        return "not an NF4 weight"
    if math.prod(x.shape[:-1]) > (most := TIMED_ROWS if tune.wanted() else FUSED_ROWS):
        return f"more than {most} rows: the weight is decoded once for all of them"
    return None


def _unreadable(x: Tensor, weight: Sequence[Tensor], layout: str) -> str | None:
    if x.device != weight[0].device:
        return f"x on {x.device}, the weight on {weight[0].device}"
    stored: Any = storage.layout(layout)
    return unreadable(weight, math.prod(stored.shape), stored.blocksize)


def _kernel(x: Tensor, weight: Sequence[Tensor], layout: str, gradient: bool, **rest: Any) -> Nf4Linear:
    stored: Any = storage.layout(layout)
    N, K = stored.shape
    return Nf4Linear(N, K, stored.blocksize, len(weight) > 2, gradient, x.dtype, stored.dtype, **rest)


@plans.by_layout
def _gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Planned | str:
    """What an input gradient comes by, or why there is no kernel."""
    if reason := _unreadable(dy, weight, layout):
        return reason
    return _planned(_kernel(dy, weight, layout, gradient=True), dy)


@plans.by_layout
def _product(
    x: Tensor, weight: Sequence[Tensor], layout: str, bias: Any, h: Any, B: Any, scale: Any, start: Any, skip: Any
) -> Planned | str:
    """What a product comes by, or why there is no kernel."""
    if reason := _unreadable(x, weight, layout):
        return reason
    operands = _operands(bias, h, B)
    if any(t.dtype != x.dtype for t in operands):
        return f"branches or a bias of another dtype than {x.dtype}"
    pairs = operands[bias is not None :]
    each = zip(pairs[::2], pairs[1::2], scale, start, strict=True)
    terms = tuple(Term.of(hi, Bi.t(), float(si), int(at), Bi.shape[0]) for hi, Bi, si, at in each)
    return _planned(_kernel(x, weight, layout, gradient=False, bias=bias is not None, terms=terms), x)


def _operands(bias: Tensor | None, h: Sequence[Tensor], B: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a product after the weight, as the kernel reads them."""
    found = [] if bias is None else [bias.contiguous()]
    for hi, Bi in zip(h, B, strict=True):
        rows = hi.reshape(-1, hi.shape[-1])
        found += [rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous(), Bi.contiguous()]
    return found


def _planned(kernel: Nf4Linear, x: Tensor) -> Planned | str:
    if reason := kernel.supports():
        return reason
    M = math.prod(x.shape[:-1])
    splits, chunks = split(kernel, M, x.device) if M else (1, 1)
    return Planned(dataclasses.replace(kernel, splits=splits), chunks, M, (*x.shape[:-1], kernel.width))


def split(kernel: Nf4Linear, M: int, device: torch.device) -> tuple[int, int]:
    """Parts of the sums and the chunks of each part: the split that is counted to take the least time.

    The parts, float32, take no more memory than the decoded weight would.
    """
    config = kernel.choose(kernel.configs(of_device(device)), M=M)
    tiles = math.prod(kernel.grid(config, M=M)) // kernel.splits
    chunks, processors = -(-kernel.length // CHUNK), multiprocessors(device)
    enough = -(-12 // config.warps)  # programs on a multiprocessor that hide each other's latencies

    def seconds(each: int) -> float:
        parts = -(-chunks // each)
        load = max(-(-tiles * parts // processors), enough) * (each + 1)  # a chunk's time goes to start and end
        decoding = load * config["BLOCK_OUT"] * CHUNK / DECODED
        return decoding + (8 * parts * M * kernel.width / TRAFFIC + LAUNCH if parts > 1 else 0.0)

    most = max(1, kernel.length // (2 * M))
    each = min({-(-chunks // parts) for parts in range(1, min(chunks, most) + 1)}, key=seconds)
    return -(-chunks // each), each


def _examples() -> tuple[Nf4Linear, ...]:
    bf16 = torch.bfloat16
    shape = {"blocksize": 64, "nested": True, "dtype": bf16, "weight": bf16}
    branch = Term(16, 16, 1, 16, 2.0, 0, 4096)
    return (
        Nf4Linear(4096, 4096, gradient=False, terms=(branch,), splits=4, **shape),
        Nf4Linear(4096, 4096, gradient=True, splits=4, **shape),
        Nf4Linear(14336, 4096, gradient=False, bias=True, **shape),
        Nf4Linear(4096, 14336, 32, False, True, torch.float16, bf16),
    )


EXAMPLES = _examples()
