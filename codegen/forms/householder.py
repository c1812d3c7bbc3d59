"""Products of Householder reflections, in the form that needs two thin matrix products instead of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.form import IN, TOKENS, Form

Tensor = torch.Tensor


@dataclass(frozen=True)
class Householder(Form):
    """`M = I - V P` with V (..., n, r) and P (..., r, n): a product of r reflections, made by `reflections`.

    >>> Householder.reflections(torch.tensor([[1.0], [0.0]])).materialise()
    tensor([[-1.,  0.],
            [ 0.,  1.]])
    """

    V: Any
    P: Any

    @classmethod
    def reflections(cls, U: Any) -> Householder:
        """`H_1 ... H_r` with `H_i = I - 2 u_i u_i' / |u_i|^2`, u_i the columns of U (..., n, r).

        By the compact form I - V T V' of Joffrain et al. (2006): T^-1 = I / 2 + the part of V' V above its diagonal.
        """
        V = U / torch.linalg.vector_norm(U, dim=-2, keepdim=True)
        inner = (V.transpose(-2, -1) @ V).triu(1)
        half = torch.diag_embed(inner.new_ones(inner.shape[-1])) / 2
        return cls(V, torch.linalg.solve_triangular(half + inner, V.transpose(-2, -1), upper=True))

    def materialise(self) -> Tensor:
        one = torch.diag_embed(self.V.new_ones(self.V.shape[-2]))
        return one - self.V @ self.P

    def formation(self) -> sympy.Expr:
        return IN * IN * self.V.shape[-1]

    def factored(self, x: Any) -> Any:
        return x - (x @ self.P.transpose(-2, -1)) @ self.V.transpose(-2, -1)

    def cost(self) -> sympy.Expr:
        return TOKENS * IN * 2 * self.V.shape[-1]

    def is_light(self) -> bool:
        return True

    def transpose(self) -> Form:
        return Householder(self.P.transpose(-2, -1), self.V.transpose(-2, -1))
