"""MoLA: mixtures of LoRA experts, more of them in some layers than in others, of which every token takes a few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Mola(Method):
    """y + s sum_i g_i B_i A_i x over the top k of softmax(G x), g sums to one, s = alpha / r  (Gao et al. 2024)

    The paper's load balancing is a loss of activations, which no regulariser of tensors is: it is left out.
    """

    r: int = arg(8, low=1, help="rank of an expert")
    experts: int | tuple[int, ...] = arg(8, low=2, help="how many, or how many in each layer: (2, 2, 4, 8)")
    top_k: int = arg(2, low=2, help="experts that a token takes; the gate of a single one would have no gradient")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")

    paper = "https://arxiv.org/abs/2402.08562"

    def check(self) -> str | None:
        fewest = min(self.experts, default=0) if isinstance(self.experts, tuple) else self.experts
        return f"top_k={self.top_k} of {fewest} experts" if self.top_k > fewest else None

    def fits(self, site: Site) -> str | None:
        if isinstance(self.experts, tuple) and (site.layer is None or site.layer >= len(self.experts)):
            where = "in no layer" if site.layer is None else f"in layer {site.layer}"
            return f"experts counts those of layers 0 to {len(self.experts) - 1}, and this is {where}"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        experts = self.experts[site.layer or 0] if isinstance(self.experts, tuple) else self.experts
        return {
            "A": Param((experts, self.r, site.in_features), kaiming),
            "B": Param((experts, site.out_features, self.r)),
            "router": Param((experts, site.in_features), kaiming),
        }

    def output(self, x: Tensor, y: Tensor, A: Tensor, B: Tensor, router: Tensor) -> Tensor:
        shares = F.linear(x, router).softmax(-1)
        taken = torch.zeros_like(shares).scatter(-1, shares.topk(self.top_k, dim=-1)[1], 1.0) * shares
        gates = taken / taken.sum(-1, keepdim=True)
        h = F.linear(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
        h = (gates.unsqueeze(-1) * h).flatten(-2)
        return y + (1.0 if self.alpha is None else self.alpha / self.r) * F.linear(h, B.transpose(0, 1).flatten(1))
