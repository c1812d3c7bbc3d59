"""HiRA: an update of high rank, by the weight itself times a low-rank matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rewrite.codegen.forms import Form, Hadamard, LowRank
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Hira(Method):
    """W + W o (B A), elementwise  (Huang et al. 2025)"""

    r: int = arg(32, low=1, help="rank of the factor")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    init: Literal["kaiming", "gaussian"] = arg("kaiming", help="how A starts: uniform, or normal with deviation 1 / r")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://openreview.net/forum?id=TwJrTz9cRS"

    def params(self, site: Site) -> dict[str, Param]:
        A, B = (*site.leading, self.r, site.in_features), (*site.leading, site.out_features, self.r)
        if site.kind == "embedding":  # as HF PEFT starts there
            return {"A": Param(A), "B": Param(B, torch.nn.init.normal_)}
        return {"A": Param(A, kaiming if self.init == "kaiming" else self.normal), "B": Param(B)}

    def normal(self, A: Tensor) -> Tensor:
        """Fill A from a normal with deviation 1 / r."""
        return A.normal_(std=1 / self.r)

    def weight(self, W: Form, A: Tensor, B: Tensor) -> Form:
        return W + Hadamard(W, LowRank(B, A))
