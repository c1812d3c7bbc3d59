"""BOFT: the inputs of a layer rotated by a butterfly of blocks, its outputs scaled; without dropout of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Base, Butterfly, Diagonal, Form, cayley
from rewrite.method import Method, Param, Tensor, arg
from rewrite.methods.oft import block_size
from rewrite.sites import Site


@dataclass(frozen=True)
class Boft(Method):
    """diag(s) W (F_m ... F_1)', each F the Cayley transforms of (R - R') / 2 in blocks, permuted  (Liu et al. 2023)."""

    block: int = arg(4, low=2, help="size of a block, or the nearest divisor of the inputs")
    blocks: int | None = arg(None, low=1, help="number of blocks instead")
    factors: int = arg(1, low=1, help="butterfly factors: 2^(factors - 1) blocks are mixed")

    kinds = frozenset({"linear", "conv", "expert"})
    paper = "https://arxiv.org/abs/2311.06243"

    def params(self, site: Site) -> dict[str, Param]:
        size = block_size(site.in_features, self.block, self.blocks)
        R = Param((*site.leading, self.factors, site.in_features // size, size, size))
        return {"R": R, "s": Param((*site.leading, site.out_features, 1), torch.nn.init.ones_)}

    def fits(self, site: Site) -> str | None:
        *_, count, size, _ = self.params(site)["R"].shape
        groups = 2 ** (self.factors - 1)
        if groups > 1 and (size % 2 or count % groups):
            return f"factors={self.factors} wants even blocks in groups of {groups}, not {count} of size {size}"
        return "a single channel cannot be rotated" if size == 1 else None

    def weight(self, W: Base, R: Tensor, s: Tensor) -> Form:
        rotations = cayley((R - R.transpose(-2, -1)) / 2)
        return Diagonal(s.squeeze(-1)) @ (W @ Butterfly(rotations.transpose(-2, -1)))
