"""WaveFT: an update with a few trained wavelet coefficients at random places; one level of the Haar wavelet (db1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Coordinates, Form, Haar, scattered
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Waveft(Method):
    """W + scale T(S), S zero but for c at the places `at`, T the inverse wavelet transform  (Bilican et al. 2025)"""

    n: int = arg(2592, low=1, help="number of coefficients; all, where the weight has fewer")
    scale: float = arg(25.0, above=0, help="factor of the update")
    idwt: bool = arg(True, help="transform the coefficients; else they are entries of the weight")
    seed: int = arg(777, low=0, help="of the places, which are the same in all layers of a shape")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2505.12532"

    def params(self, site: Site) -> dict[str, Param]:
        d_out, d_in = site.out_features, site.in_features
        count = min(self.n, d_out * d_in)
        at = Param(
            (2, count), lambda t: t.copy_(scattered(count, d_out, d_in, self.seed)), trainable=False, dtype=torch.int32
        )
        return {"c": Param((*site.leading, count)), "at": at}

    def delta(self, c: Tensor, at: Tensor, shape: tuple[int, int]) -> Form:
        d_out, d_in = shape
        rows, columns = at.select(0, 0), at.select(0, 1)
        if not self.idwt:
            return Coordinates(c, rows, columns, d_out, d_in) * self.scale
        even = Coordinates(c, rows, columns, d_out + d_out % 2, d_in + d_in % 2)
        return Haar(even, d_out, d_in) * self.scale
