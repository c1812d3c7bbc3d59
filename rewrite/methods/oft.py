"""OFT: the inputs of a layer rotated in blocks.  HF PEFT's `module_dropout`, which it never applies, is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.forms import Base, BlockDiagonal, Form, cayley, cayley_neumann, skew
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


def block_size(width: int, block: int, blocks: int | None = None) -> int:
    """The divisor of `width` above 1 that is nearest to `block`, or leaves nearest to `blocks` blocks; 1 if none."""
    sizes = [size for size in range(2, width + 1) if width % size == 0] or [1]
    if blocks is None:
        return min(sizes, key=lambda size: (abs(size - block), size))
    return min(sizes, key=lambda size: (abs(width // size - blocks), width // size))


@dataclass(frozen=True)
class Oft(Method):
    """W diag(R_1, ..., R_n)', each R the Cayley transform of a skew matrix  (Qiu et al. 2023; as a series, 2025)."""

    block: int = arg(32, low=2, help="size of a block, or the nearest divisor of the inputs")
    blocks: int | None = arg(None, low=1, help="number of blocks instead")
    neumann: int | None = arg(5, low=2, help="terms of the Neumann series; none is the exact transform, transposed")
    coft: float | None = arg(None, above=0, help="constrained OFT: norm of the skew matrices of all blocks, eps")
    share: bool = arg(False, help="the same block everywhere")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2306.07280"

    def params(self, site: Site) -> dict[str, Param]:
        name, width = ("E", site.out_features) if site.kind == "embedding" else ("R", site.in_features)
        size = block_size(width, self.block, self.blocks)
        return {name: Param((*site.leading, 1 if self.share else width // size, size * (size - 1) // 2))}

    def fits(self, site: Site) -> str | None:
        return "a single channel cannot be rotated" if 0 in next(iter(self.params(site).values())).shape else None

    def weight(self, W: Base, **theta: Tensor) -> Form:
        if "E" in theta:  # the output of an embedding is rotated: its inputs are rows of a table
            return self.rotation(theta["E"], W.shape[-2]) @ W
        return W @ self.rotation(theta["R"], W.shape[-1])

    def rotation(self, entries: Tensor, width: int) -> Form:
        """diag(R_1, ..., R_n)' for entries (..., n, b (b - 1) / 2)."""
        size = (1 + math.isqrt(1 + 8 * entries.shape[-1])) // 2
        if self.coft is not None:  # the gradient passes by the projection
            entries = entries + (self.projected(entries) - entries).detach()
        Q = skew(entries, size)
        R = cayley(Q) if self.neumann is None else cayley_neumann(Q, self.neumann)
        return BlockDiagonal(R.transpose(-2, -1), width // size if self.share else 1)

    def projected(self, entries: Tensor) -> Tensor:
        """Every block within its share of the ball: |Q| <= eps / sqrt(n)."""
        norm = torch.linalg.vector_norm(entries, dim=-1, keepdim=True) * math.sqrt(2)
        limit = (self.coft or 0.0) / math.sqrt(entries.shape[-2])
        return entries * (limit / norm.clamp(min=limit))

    def schedule(self, step: int, sites: Sequence[Mapping[str, Tensor]], memory: dict[Any, Any]) -> None:
        for theta in sites if self.coft is not None else ():
            for entries in theta.values():
                entries.copy_(self.projected(entries))
