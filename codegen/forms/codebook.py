"""Matrices that are made of a few vectors of a bank, which many matrices may share.

Their product is no cheaper than the dense one: they are meant for factors, which are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.form import IN, OUT, Form


@dataclass(frozen=True)
class Codebook(Form):
    """A matrix (..., rows, width) whose rows are vectors one after the other, the last one cut where it must be.

    Each is a mixture of the k vectors in `bank` (h, b) that its `logits` (..., rows, ceil(width / b), h) are largest
    for, by the softmax of those k alone (Li et al. 2024).  No other logit has a gradient, and with k = 1 none has.

    >>> bank = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> Codebook(torch.tensor([[[0.0, 0.0, -1.0]]]), bank, 2, 2).materialise()
    tensor([[2., 3.]])
    """

    logits: Any
    bank: Any
    k: int
    width: int

    def materialise(self) -> torch.Tensor:
        best = self.logits.topk(self.k, dim=-1)
        shares, vectors = best[0].softmax(-1), self.bank[best[1]]
        return (shares.unsqueeze(-2) @ vectors).flatten(-3)[..., : self.width]

    def formation(self) -> sympy.Expr:
        return self.k * IN * OUT
