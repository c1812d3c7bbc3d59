"""Matrices of 2 x 2 blocks: every channel takes of itself and of one other, as the rotation of a pair does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, TOKENS, Form

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pairs(Form):
    """`M = diag(own) + diag(other) J` of size n, where J turns pairs by a right angle: (u, v) to (-v, u).

    In each `group` of channels the first half is paired with the second one.  `own` and `other` (w,) have n rounded up
    to whole groups: a channel that is paired with none beyond n is scaled alone.

    >>> Pairs(torch.zeros(4), torch.ones(4), 4, 4).apply(torch.arange(4.0))
    tensor([-2., -3.,  0.,  1.])
    """

    own: Any
    other: Any
    group: int
    n: int

    def factored(self, x: Any) -> Any:
        whole = F.pad(x, (0, self.own.shape[-1] - self.n))
        u, v = self._halves(whole)
        turned = torch.stack([-v, u], dim=-2).flatten(-3)
        return (whole * self.own + turned * self.other)[..., : self.n]

    def _halves(self, x: Any) -> tuple[Any, Any]:
        parts = x.unflatten(-1, (-1, 2, self.group // 2))
        return parts.select(-2, 0), parts.select(-2, 1)

    def materialise(self) -> Tensor:
        one = torch.diag_embed(self.own.new_ones(self.n))
        return self.factored(one).transpose(-2, -1)

    def formation(self) -> sympy.Expr:
        return 2 * IN * IN

    def cost(self) -> sympy.Expr:
        return 2 * TOKENS * IN

    def is_light(self) -> bool:
        return True

    def transpose(self) -> Form:
        u, v = self._halves(self.other)  # J' diag(u, v) = -diag(v, u) J
        return Pairs(self.own, torch.stack([-v, -u], dim=-2).flatten(-3), self.group, self.n)
