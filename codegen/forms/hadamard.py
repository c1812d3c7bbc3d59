"""Elementwise products of matrices; that of two low-rank ones is low-rank again, and is applied as such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form
from rewrite.codegen.forms.low_rank import LowRank
from rewrite.codegen.maps import LINEAR, LayerMap


@dataclass(frozen=True)
class Hadamard(Form):
    """`M_ij = left_ij right_ij`.

    For low-rank sides of ranks r and s it is the matrix of rank r s whose factors are the row-wise Khatri-Rao product
    of the B's and the column-wise one of the A's (Slyusar 1999), so that nothing of the size of M is needed.

    >>> Hadamard(LowRank(torch.ones(3, 1), 2 * torch.ones(1, 2)), LowRank(torch.ones(3, 1), torch.ones(1, 2))).rank
    1
    """

    left: Form
    right: Form

    @property
    def rank(self) -> int | None:
        """r s where both sides are low-rank, else None."""
        if not (isinstance(self.left, LowRank) and isinstance(self.right, LowRank)):
            return None
        return self.left.A.shape[-2] * self.right.A.shape[-2]

    def product(self) -> LowRank:
        """The low-rank matrix that this is, where both sides are."""
        assert isinstance(self.left, LowRank)
        assert isinstance(self.right, LowRank)
        B = self.left.left[..., :, None] * self.right.left[..., None, :]
        A = self.left.A[..., :, None, :] * self.right.A[..., None, :, :]
        return LowRank(B.flatten(-2), A.flatten(-3, -2))

    def has_factors(self, layer: LayerMap) -> bool:
        return self.rank is not None

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if self.rank is None:
            return super().apply(x, layer, scale, like)
        return self.product().apply(x, layer, scale, like)

    def materialise(self) -> torch.Tensor:
        return self.left.materialise() * self.right.materialise()

    def formation(self) -> sympy.Expr:
        return self.left.formation() + self.right.formation() + IN * OUT

    def cost(self) -> sympy.Expr:
        return super().cost() if self.rank is None else self.rank * (TOKENS + 1) * (IN + OUT)

    def transpose(self) -> Form:
        return Hadamard(self.left.T, self.right.T)
