"""Prompt tuning: learned embeddings in front of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Prompt(Method):
    """[P; E(input)]: n virtual tokens that every input begins with  (Lester et al. 2021)"""

    n: int = arg(20, low=1, help="virtual tokens")
    init: Literal["random", "vocab"] = arg("random", help="standard normal, or embeddings of n random tokens")

    kinds = frozenset({"tokens"})
    default_sites = "input"
    identity = False
    paper = "https://arxiv.org/abs/2104.08691"

    def params(self, site: Site) -> dict[str, Param]:
        return {"P": Param((self.n, site.in_features), torch.nn.init.normal_)}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        if self.init == "vocab":
            theta["P"].copy_(W[torch.randint(len(W), (self.n,), device=W.device)])

    def tokens(self, P: Tensor) -> Tensor:
        return P
