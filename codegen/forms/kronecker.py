"""Kronecker products: a small matrix whose every entry scales a copy of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form


@dataclass(frozen=True)
class Kronecker(Form):
    """`M = L (x) right` (a b, c d), block (i, j) of which is L_ij right; L (..., a, c) and right (..., b, d).

    With x as a matrix X (c, d), its product is the matrix L X right' (a, b), row by row.

    >>> from rewrite.codegen.forms import Dense
    >>> Kronecker(torch.tensor([[1.0, 2.0]]), Dense(torch.ones(2, 1))).materialise()
    tensor([[1., 2.],
            [1., 2.]])
    """

    L: Any
    right: Form

    def materialise(self) -> torch.Tensor:
        right = self.right.materialise()
        blocks = self.L[..., :, None, :, None] * right[..., None, :, None, :]
        return blocks.flatten(-2).flatten(-3, -2)

    def factored(self, x: Any) -> Any:
        c = self.L.shape[-1]
        y = self.right.apply(x.unflatten(-1, (c, x.shape[-1] // c)))  # (..., c, b)
        return F.linear(y.transpose(-2, -1), self.L).transpose(-2, -1).flatten(-2)

    def formation(self) -> sympy.Expr:
        return self._of_right(self.right.formation()) + IN * OUT

    def cost(self) -> sympy.Expr:
        c = self.L.shape[-1]
        return self._of_right(self.right.cost()).subs(TOKENS, TOKENS * c) + TOKENS * OUT * c  # type: ignore[return-value]

    def _of_right(self, cost: sympy.Expr) -> sympy.Expr:
        a, c = self.L.shape[-2:]
        return cost.subs({IN: IN / c, OUT: OUT / a}, simultaneous=True)  # type: ignore[return-value]

    def transpose(self) -> Form:
        return Kronecker(self.L.transpose(-2, -1), self.right.T)
