"""Block-diagonal matrices: square blocks along the diagonal, each on its own part of the vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.form import IN, TOKENS, Form

Tensor = torch.Tensor


@dataclass(frozen=True)
class BlockDiagonal(Form):
    """`M = diag(M_1, ..., M_n)` with blocks (..., n, b, b); all of one block where `count` says how often it stands.

    >>> BlockDiagonal(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), count=2).apply(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    tensor([3., 7., 2., 4.])
    """

    blocks: Any
    count: int = 1

    @property
    def each(self) -> Any:
        """All blocks, (..., n, b, b)."""
        blocks = self.blocks
        return blocks if self.count == 1 else blocks.expand(*blocks.shape[:-3], self.count, *blocks.shape[-2:])

    def materialise(self) -> Tensor:
        blocks = self.each
        on_diagonal = torch.diag_embed(blocks.new_ones(blocks.shape[-3]))  # (n, n)
        apart = blocks.unsqueeze(-2) * on_diagonal[:, None, :, None]  # (..., n, b, n, b)
        return apart.flatten(-2).flatten(-3, -2)

    def factored(self, x: Any) -> Any:
        blocks = self.each
        parts = x.unflatten(-1, (blocks.shape[-3], blocks.shape[-1]))
        rule = "nij,...nj->...ni" if blocks.ndim == 3 else "enij,e...nj->e...ni"
        return torch.einsum(rule, blocks, parts).flatten(-2)

    def cost(self) -> sympy.Expr:
        return TOKENS * IN * self.blocks.shape[-1]

    def transpose(self) -> Form:
        return BlockDiagonal(self.blocks.transpose(-2, -1), self.count)
