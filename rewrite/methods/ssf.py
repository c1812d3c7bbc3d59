"""SSF: the output of every operation scaled and shifted, channel by channel; merges into weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.method import Method, Param, Tensor
from rewrite.sites import Site


@dataclass(frozen=True)
class Ssf(Method):
    """gamma y + beta  (Lian et al. 2022), from gamma = 1, beta = 0; the paper's code adds noise of deviation 0.02."""

    kinds = frozenset({"linear", "conv", "norm"})
    pointwise = True
    paper = "https://arxiv.org/abs/2210.08823"

    def params(self, site: Site) -> dict[str, Param]:
        return {"gamma": Param((site.outputs,), torch.nn.init.ones_), "beta": Param((site.outputs,))}

    def fits(self, site: Site) -> str | None:
        plain = site.place.type == "LayerNorm" and "bias" in dict(site.place.tensors)
        if site.kind == "norm" and not plain:  # it may scale by 1 + weight, or have its channels elsewhere
            return f"it merges into the weight and bias of a LayerNorm, not of {site.place.type}"
        return None

    def output(self, x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return y * gamma.to(y.dtype) + beta.to(y.dtype)
