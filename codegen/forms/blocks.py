"""Matrices in blocks: a low-rank one of its own for every block, or one block that repeats along the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form


def padded(tensor: Any, dim: int, multiple: int) -> Any:
    """`tensor` with zeros at the end of `dim` (negative), up to a multiple of that size."""
    missing = -tensor.shape[dim] % multiple
    return F.pad(tensor, [0] * (2 * (-dim - 1)) + [0, missing]) if missing else tensor


def divided(tensor: Any, dim: int, parts: int) -> Any:
    """`dim` (negative) as (parts, size of a part); zeros fill up the last one."""
    tensor = padded(tensor, dim, parts)
    return tensor.unflatten(dim, (parts, tensor.shape[dim] // parts))


@dataclass(frozen=True)
class LowRankBlocks(Form):
    """k x k blocks, each of rank r / k: block (i, j) is B_ij A_ij with A (..., r, d_in) and B (..., d_out, r).

    B_ij are the rows i of B at the j-th of k parts of its r columns, A_ij the columns j of A at the i-th of k parts of
    its r rows, so that it costs what one low-rank matrix of rank r costs (GraLoRA, Jung et al. 2025).

    >>> LowRankBlocks(torch.ones(3, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), 2).materialise()
    tensor([[1., 1.],
            [1., 1.],
            [2., 2.]])
    """

    B: Any
    A: Any
    k: int

    def parts(self) -> tuple[Any, Any]:
        """A as (..., i, rank, j, columns) and B as (..., i, rows, j, rank)."""
        A = divided(divided(self.A, -1, self.k), -3, self.k)
        return A, divided(divided(self.B, -1, self.k), -3, self.k)

    def materialise(self) -> torch.Tensor:
        A, B = self.parts()
        blocks = torch.einsum("...iojp,...ipjc->...iojc", B, A)
        whole = blocks.flatten(-2).flatten(-3, -2)
        return whole[..., : self.B.shape[-2], : self.A.shape[-1]]

    def factored(self, x: Any) -> Any:
        A, B = self.parts()
        h = torch.einsum("...jc,ipjc->...ijp", divided(x, -1, self.k), A)
        y = torch.einsum("...ijp,iojp->...io", h, B).flatten(-2)
        return y[..., : self.B.shape[-2]]

    def formation(self) -> sympy.Expr:
        return self.A.shape[-2] // self.k * IN * OUT

    def cost(self) -> sympy.Expr:
        return TOKENS * self.A.shape[-2] * (IN + OUT)

    def is_light(self) -> bool:
        return True

    def transpose(self) -> Form:
        return LowRankBlocks(self.A.transpose(-2, -1), self.B.transpose(-2, -1), self.k)


@dataclass(frozen=True)
class Tiled(Form):
    """`[K K ... K]`, the last copy cut off at `columns`; K (..., d_out, r).  Its product is K on the sum of x's pieces.

    >>> Tiled(torch.tensor([[1.0, 2.0]]), 5).materialise()
    tensor([[1., 2., 1., 2., 1.]])
    """

    K: Any
    columns: int

    def materialise(self) -> torch.Tensor:
        copies = -(-self.columns // self.K.shape[-1])
        return torch.cat([self.K] * copies, dim=-1)[..., : self.columns]

    def factored(self, x: Any) -> Any:
        r = self.K.shape[-1]
        x = padded(x, -1, r)
        return F.linear(x.unflatten(-1, (x.shape[-1] // r, r)).sum(-2), self.K)

    def cost(self) -> sympy.Expr:
        return TOKENS * (IN + self.K.shape[-1] * OUT)

    def is_light(self) -> bool:
        return True
