"""GraLoRA: a low-rank update in blocks, each with factors of its own."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Form, LowRank, LowRankBlocks
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Gralora(Method):
    """W_ij + s B_ij A_ij over k x k blocks, each of rank r / k, s = alpha / (r + hybrid)  (Jung et al. 2025)"""

    r: int = arg(32, low=1, help="rank, a multiple of k")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none makes the scale 1")
    k: int = arg(2, low=1, help="blocks along each side")
    hybrid: int = arg(0, low=0, help="rank of a low-rank update of the whole beside it")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2505.20355"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return f"r={self.r} is no multiple of k={self.k}" if self.r % self.k else None

    def params(self, site: Site) -> dict[str, Param]:
        def pair(a: str, b: str, r: int) -> dict[str, Param]:
            A, B = (*site.leading, r, site.in_features), (*site.leading, site.out_features, r)
            return {a: Param(A, kaiming), b: Param(B)}

        return pair("A", "B", self.r) | (pair("A1", "B1", self.hybrid) if self.hybrid else {})

    def delta(self, A: Tensor, B: Tensor, A1: Tensor | None = None, B1: Tensor | None = None) -> Form:
        update: Form = LowRankBlocks(B, A, self.k)
        update = update if A1 is None else update + LowRank(B1, A1)
        return update * (1.0 if self.alpha is None else self.alpha / (self.r + self.hybrid))
