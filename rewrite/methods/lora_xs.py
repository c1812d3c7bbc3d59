"""LoRA-XS: a square core between frozen singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class LoraXs(Method):
    """y + s B R A x, B = U_r, A = S_r V_r' of the SVD of W, s = alpha / r; R starts at zero  (Balazy et al. 2024)"""

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    within_rank = True
    paper = "https://arxiv.org/abs/2405.17604"

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "A": Param((*site.leading, self.r, site.in_features), trainable=False),
            "B": Param((*site.leading, site.out_features, self.r), trainable=False),
            "R": Param((*site.leading, self.r, self.r)),
        }

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        theta["A"].copy_((S[..., :, None] * Vh)[..., : self.r, :])
        theta["B"].copy_(U[..., : self.r])

    def delta(self, A: Tensor, B: Tensor, R: Tensor) -> Form:
        return LowRank(B, A, R) * (1.0 if self.alpha is None else self.alpha / self.r)
