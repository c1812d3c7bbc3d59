"""DeLoRA: normalised directions, whose strength is learned apart from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Delora(Method):
    """W + (lambda / r) sum_i b_i (a_i o w) / (|b_i| |a_i|), w the column norms of W  (Bini et al. 2025)"""

    r: int = arg(8, low=1, help="rank")
    strength: float = arg(15.0, above=0, help="lambda at the start: a bound on the update")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2503.18225"

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "A": Param((*site.leading, self.r, site.in_features), kaiming),
            "B": Param((*site.leading, site.out_features, self.r)),
            "strength": Param((*site.leading, 1), lambda tensor: tensor.fill_(self.strength)),
            "w": Param((*site.leading, site.in_features), trainable=False),
        }

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        theta["w"].copy_(torch.linalg.vector_norm(W, dim=-2))

    def delta(self, A: Tensor, B: Tensor, strength: Tensor, w: Tensor) -> Form:
        a = torch.linalg.vector_norm(A, dim=-1).clamp(min=1e-4)
        b = torch.linalg.vector_norm(B, dim=-2).clamp(min=1e-4)
        return LowRank(B * (strength / self.r / (a * b))[..., None, :], A * w[..., None, :])
