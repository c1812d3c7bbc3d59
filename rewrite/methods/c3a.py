"""C3A: circular convolutions, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rewrite.codegen.forms import Circulant, Form
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class C3a(Method):
    """W + C / d_in with circulant blocks of size b, each of which is the one row w_ij  (Chen et al. 2024)"""

    block_size: int | None = arg(None, low=1, help="b, a divisor of both sizes; none is the greatest")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2407.19342"

    def fits(self, site: Site) -> str | None:
        sizes = site.out_features, site.in_features
        if self.block_size is None or not any(size % self.block_size for size in sizes):
            return None
        return f"block_size={self.block_size} does not divide both sizes, {sizes[0]} x {sizes[1]}"

    def params(self, site: Site) -> dict[str, Param]:
        b = self.block_size or math.gcd(site.out_features, site.in_features)
        return {"w": Param((*site.leading, site.out_features // b, site.in_features // b, b))}

    def delta(self, w: Tensor) -> Form:
        return Circulant(w) * (1 / (w.shape[-2] * w.shape[-1]))
