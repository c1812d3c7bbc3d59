"""(IA)3: one learned factor for every channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Ia3(Method):
    """y v, or W (x v) where it scales the input, as the paper does in a feed-forward network  (Liu et al. 2022)"""

    scales: Literal["output", "input"] = arg("output", help="the output of the layer, bias included, or its input")

    kinds = frozenset({"linear", "conv"})
    pointwise = True
    paper = "https://arxiv.org/abs/2205.05638"

    def view(self) -> str:
        return self.scales

    def params(self, site: Site) -> dict[str, Param]:
        return {"v": Param((site.inputs if self.scales == "input" else site.outputs,), torch.nn.init.ones_)}

    def output(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return y * v.to(y.dtype)

    def input(self, x: Tensor, v: Tensor) -> Tensor:
        return x * v.to(x.dtype)
