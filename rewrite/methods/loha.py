"""LoHa: the elementwise product of two low-rank updates, of rank up to r squared."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Form, Hadamard, LowRank, spread_over
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Loha(Method):
    """W + s (B1 A1) o (B2 A2), s = alpha / r  (Hyeon-Woo et al. 2022; Yeh et al. 2024)"""

    r: int = arg(8, low=1, help="rank of each of the two")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    tucker: bool = arg(False, help="of a convolution: r x r kernels of their own between A and B")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2309.14859"

    def params(self, site: Site) -> dict[str, Param]:
        stack, area = site.leading, site.place.map.area
        tucker = self.tucker and area > 1
        A = (*stack, self.r, site.in_features // area if tucker else site.in_features)
        B = (*stack, site.out_features, self.r)
        theta = {"A1": Param(A, kaiming), "B1": Param(B, kaiming), "A2": Param(A), "B2": Param(B, kaiming)}
        cores = {name: Param((self.r, self.r, area), kaiming) for name in ("T1", "T2")}
        return theta | cores if tucker else theta

    def delta(
        self, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, T1: Tensor | None = None, T2: Tensor | None = None
    ) -> Form:
        scale = 1.0 if self.alpha is None else self.alpha / self.r
        return Hadamard(LowRank(B1, spread_over(T1, A1)), LowRank(B2, spread_over(T2, A2))) * scale
