"""Storage layouts of a frozen weight: how stored tensors decode to the dense weight.

A layout prints as a short string (`nf4:bfloat16:64:11x7`), which is what graph nodes carry, and `layout(text)`
reads it back.  `dense` is the layout of a plain tensor.  A new storage format is one more class here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from rewrite.codegen import nf4
from rewrite.codegen.cpu import nf4 as cpu_nf4
from rewrite.codegen.kernels import nf4 as nf4_kernels

Tensor = torch.Tensor


class Layout(Protocol):
    """How a tuple of stored tensors becomes a dense weight."""

    def decode(self, *stored: Tensor) -> Tensor:
        """The dense weight, (d_out, d_in), in the dtype it had when it was stored."""
        ...


@dataclass(frozen=True)
class Dense:
    """The weight itself."""

    def decode(self, *stored: Tensor) -> Tensor:
        return stored[0]

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class Nf4:
    """4-bit NormalFloat codes with one absmax per block  (Dettmers et al. 2023).

    Stored: `codes, absmax`, or double-quantised `codes, absmax (uint8), nested absmax, nested code, offset`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int = 64

    def decode(self, *stored: Tensor) -> Tensor:
        for kernels in (nf4_kernels, cpu_nf4):
            if (weight := kernels.decoded(stored, self.shape, self.dtype, self.blocksize)) is not None:
                return weight
        codes, absmax, *nested = stored
        if nested:
            absmax = nf4.dequantize_absmax(absmax, *nested)
        return nf4.dequantize(codes, absmax, self.shape, self.dtype, self.blocksize)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"nf4:{str(self.dtype).removeprefix('torch.')}:{self.blocksize}:{size}"


@functools.cache
def layout(text: str) -> Layout:
    """The layout that prints as `text`.

    >>> layout("nf4:bfloat16:64:11x7").shape
    (11, 7)
    """
    if text == "dense":
        return Dense()
    kind, dtype, blocksize, size = text.split(":")
    if kind != "nf4":
        raise ValueError(f"unknown storage layout {text!r}")
    return Nf4(tuple(map(int, size.split("x"))), getattr(torch, dtype), int(blocksize))
