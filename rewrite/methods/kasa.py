"""KaSA: the smallest singular triples of the weight give way to trained ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.methods.sorsa import skewness
from rewrite.sites import Site


@dataclass(frozen=True)
class Kasa(Method):
    """y - B0 A0 x + s B diag(d) A x, B0 A0 the r smallest singular triples of W, s = alpha / r  (Wang et al. 2024)

    beta |d|^2 + gamma (|A A' - I| + |B' B - I|) joins the loss.  B d A starts at what B0 A0 takes away, where the paper
    starts at zero and so without it: step 0 is the model as it was.
    """

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    beta: float = arg(1e-4, low=0, help="weight of the squares of d in the loss")
    gamma: float = arg(1e-3, low=0, help="weight of the distance from orthonormal factors")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2412.06071"

    @property
    def s(self) -> float:
        """The scale of the branch."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def params(self, site: Site) -> dict[str, Param]:
        A, B = (*site.leading, self.r, site.in_features), (*site.leading, site.out_features, self.r)
        trained = {"A": Param(A), "d": Param((*site.leading, self.r)), "B": Param(B)}
        return trained | {"A0": Param(A, trainable=False), "B0": Param(B, trainable=False)}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        theta["A"].copy_(Vh[..., -self.r :, :])
        theta["d"].copy_(S[..., -self.r :] / self.s)
        theta["B"].copy_(U[..., -self.r :])
        theta["A0"].copy_(theta["A"])
        theta["B0"].copy_(theta["B"] * S[..., None, -self.r :])

    def fits(self, site: Site) -> str | None:
        limit = min(site.in_features, site.out_features)
        return f"r={self.r} leaves nothing of a weight of rank {limit}" if self.r >= limit else None

    def delta(self, A: Tensor, d: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> Form:
        return LowRank(B * (self.s * d)[..., None, :], A) - LowRank(B0, A0)

    def regulariser(self, A: Tensor, B: Tensor, d: Tensor, **theta: Tensor) -> Tensor:
        return self.beta * d.square().sum() + self.gamma * (skewness(A) + skewness(B.mT))
