"""Butterfly matrices: products of block-diagonal ones, each after a permutation that brings distant parts together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.block_diagonal import BlockDiagonal
from rewrite.codegen.forms.form import IN, TOKENS, Form

Tensor = torch.Tensor


@dataclass(frozen=True)
class Butterfly(Form):
    """`M = F_0 F_1 ... F_(m-1)`, `F_i = P_i diag(blocks_i) P_i'`, blocks (..., m, n, b, b)  (Liu et al. 2023, BOFT).

    P_i works inside groups of 2^i blocks: it takes the halves of blocks in the order even ones, odd ones, so that
    after m factors 2^(m-1) blocks are mixed; P_0 is the identity.  `reverse` multiplies the factors the other way
    round.  b is even, and n a multiple of 2^(m-1), where m > 1.

    >>> Butterfly(torch.eye(2).expand(2, 4, 2, 2)).apply(torch.arange(8.0))
    tensor([0., 1., 2., 3., 4., 5., 6., 7.])
    """

    blocks: Any
    reverse: bool = False

    def factored(self, x: Any) -> Any:
        factors = self.blocks.shape[-4]
        for i in range(factors) if self.reverse else reversed(range(factors)):
            blocks, half = self.blocks.select(-4, i), self.blocks.shape[-1] // 2
            if i == 0:
                x = BlockDiagonal(blocks).factored(x)
                continue
            halves = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).flatten(-4)
            mixed = BlockDiagonal(blocks).factored(halves)
            x = mixed.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)
        return x

    def materialise(self) -> Tensor:
        *stack, _, count, _, size = self.blocks.shape
        one = torch.diag_embed(self.blocks.new_ones((*stack, count * size)))
        return self.factored(one).transpose(-2, -1)

    def formation(self) -> sympy.Expr:
        return IN * IN * self.blocks.shape[-4] * self.blocks.shape[-1]

    def cost(self) -> sympy.Expr:
        return TOKENS * IN * self.blocks.shape[-4] * self.blocks.shape[-1]

    def transpose(self) -> Form:
        return Butterfly(self.blocks.transpose(-2, -1), not self.reverse)
