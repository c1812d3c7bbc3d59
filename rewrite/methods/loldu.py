"""LoLDU: the leading pivots of the weight's triangular factorisation are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Loldu(Method):
    """y + B (sigma diag(z) - sigma0 diag(z0)) A x, B = P L_r, z0 = D_r, A = U_r of W = P L D U  (Shi et al. 2024)"""

    r: int = arg(8, low=1, help="rank")
    alpha: float = arg(1.0, above=0, help="sigma starts at sigma0 = alpha / r")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    within_rank = True
    paper = "https://arxiv.org/abs/2410.13618"

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "z": Param((*site.leading, self.r)),
            "sigma": Param((*site.leading, 1), lambda tensor: tensor.fill_(self.alpha / self.r)),
            "A": Param((*site.leading, self.r, site.in_features), trainable=False),
            "B": Param((*site.leading, site.out_features, self.r), trainable=False),
            "z0": Param((*site.leading, self.r), trainable=False),
        }

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        P, L, U = torch.linalg.lu(W)
        pivots = U.diagonal(dim1=-2, dim2=-1)[..., : self.r]
        theta["A"].copy_(U[..., : self.r, :] / pivots.where(pivots != 0, 1)[..., :, None])
        theta["B"].copy_((P @ L)[..., : self.r])
        theta["z"].copy_(pivots)
        theta["z0"].copy_(pivots * (self.alpha / self.r))

    def delta(self, z: Tensor, sigma: Tensor, A: Tensor, B: Tensor, z0: Tensor) -> Form:
        core = sigma * z - z0
        # A stack has a core for each of its matrices; a single one keeps B out of the backward pass.
        return LowRank(B, A, core) if core.ndim == 1 else LowRank(B * core[..., None, :], A)
