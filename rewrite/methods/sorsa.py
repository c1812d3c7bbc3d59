"""SORSA: the principal singular triples of the weight are trained, and held near orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Sorsa(Method):
    """y + s (B diag(S) A - B0 A0) x, all from the SVD of W; gamma (|A A' - I| + |B' B - I|) joins the loss  (Cao 2024)

    The paper scales gamma by the learning rate's schedule; here it is constant.
    """

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale alpha / r; none makes the scale 1")
    gamma: float = arg(4e-4, low=0, help="weight of the regulariser")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    within_rank = True
    paper = "https://arxiv.org/abs/2409.00055"

    def params(self, site: Site) -> dict[str, Param]:
        A, B = (*site.leading, self.r, site.in_features), (*site.leading, site.out_features, self.r)
        trained = {"A": Param(A), "S": Param((*site.leading, self.r)), "B": Param(B)}
        return trained | {"A0": Param(A, trainable=False), "B0": Param(B, trainable=False)}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        for name, start in (("B", U[..., : self.r]), ("S", S[..., : self.r]), ("A", Vh[..., : self.r, :])):
            theta[name].copy_(start)
        theta["A0"].copy_(theta["A"])
        theta["B0"].copy_(theta["B"] * theta["S"][..., None, :])

    def delta(self, A: Tensor, S: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> Form:
        scale = 1.0 if self.alpha is None else self.alpha / self.r
        return (LowRank(B * S[..., None, :], A) - LowRank(B0, A0)) * scale

    def regulariser(self, A: Tensor, B: Tensor, **theta: Tensor) -> Tensor:
        return self.gamma * (skewness(A) + skewness(B.mT))


def skewness(rows: Tensor) -> Tensor:
    """How far the rows of a matrix (..., r, n) are from orthonormal: |M M' - I|, Frobenius, summed over the stack."""
    one = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return torch.linalg.matrix_norm(rows @ rows.mT - one).sum()
