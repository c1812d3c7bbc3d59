"""HydraLoRA: one A, several B, and a router that mixes them for every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Hydra(Method):
    """y + s sum_i g_i B_i A x, g = softmax(G x), s = alpha / r  (HydraLoRA: Tian et al. 2024)"""

    r: int = arg(8, low=1, help="rank")
    heads: int = arg(3, low=2, help="how many B")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")

    paper = "https://arxiv.org/abs/2404.19245"

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "A": Param((self.r, site.in_features), kaiming),
            "B": Param((self.heads, site.out_features, self.r)),
            "router": Param((self.heads, site.in_features), kaiming),
        }

    def output(self, x: Tensor, y: Tensor, A: Tensor, B: Tensor, router: Tensor) -> Tensor:
        gates = F.linear(x, router).softmax(-1)
        h = (gates.unsqueeze(-1) * F.linear(x, A).unsqueeze(-2)).flatten(-2)
        return y + (1.0 if self.alpha is None else self.alpha / self.r) * F.linear(h, B.transpose(0, 1).flatten(1))
