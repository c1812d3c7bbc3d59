"""LoKr: a Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Dense, Form, Kronecker, LowRank, spread_over
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Lokr(Method):
    """W + s C (x) (B A), s = alpha / r; a whole matrix M for B A where r is half of its size  (Yeh et al. 2024)"""

    r: int = arg(8, low=1, help="rank of the right factor")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    factor: int | None = arg(None, low=1, help="size of the left factor, about; none is near the square root")
    both: bool = arg(False, help="factor the left one too, C = C2 C1, where r is less than half of its size")
    tucker: bool = arg(False, help="of a convolution: r x r kernels of their own between A and B")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2309.14859"

    def params(self, site: Site) -> dict[str, Param]:
        stack, area, r = site.leading, site.place.map.area, self.r
        a, b = split(site.out_features, self.factor)
        c, d = split(site.in_features // area, self.factor)
        left = {"C": Param((*stack, a, c))}
        if self.both and r < max(a, c) / 2:
            left = {"C1": Param((*stack, r, c), kaiming), "C2": Param((*stack, a, r))}
        if r >= max(b, d) / 2:
            return left | {"M": Param((*stack, b, d * area), kaiming)}
        tucker = self.tucker and area > 1
        right = {
            "A": Param((*stack, r, d if tucker else d * area), kaiming),
            "B": Param((*stack, b, r), kaiming),
        }
        return left | right | ({"T": Param((r, r, area), kaiming)} if tucker else {})

    def delta(
        self,
        C: Tensor | None = None,
        C1: Tensor | None = None,
        C2: Tensor | None = None,
        M: Tensor | None = None,
        A: Tensor | None = None,
        B: Tensor | None = None,
        T: Tensor | None = None,
    ) -> Form:
        left = C2 @ C1 if C is None else C  # type: ignore[operator]
        right = LowRank(B, spread_over(T, A)) if M is None else Dense(M)  # type: ignore[arg-type]
        return Kronecker(left, right) * (1.0 if self.alpha is None else self.alpha / self.r)


def split(size: int, factor: int | None) -> tuple[int, int]:
    """`size` as a product m n, m <= n: m is `factor` or the largest divisor below it, none the nearest to the root.

    >>> split(128, None), split(128, 4), split(127, None)
    ((8, 16), (4, 32), (1, 127))
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    m = max(m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= (factor or size))
    return m, size // m
