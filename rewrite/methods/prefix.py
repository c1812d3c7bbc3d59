"""Prefix tuning: learned keys and values before the input, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Prefix(Method):
    """softmax(q [P_k; K]^T) [P_v; V] in every layer  (Li and Liang 2021)

    P is learned as it is, as in P-tuning v2 (Liu et al. 2022), or is W2 tanh(W1 E + b1) + b2 with `hidden`.  Its keys
    take no rotary embedding.
    """

    n: int = arg(20, low=1, help="virtual tokens")
    hidden: int | None = arg(None, low=1, help="width of the network that P comes from; none learns P itself")
    init: Literal["random", "zero"] = arg("random", help="zero: keys and values start at zero")

    kinds = frozenset({"tokens"})
    default_sites = "input"
    identity = False
    paper = "https://arxiv.org/abs/2101.00190"

    def params(self, site: Site) -> dict[str, Param]:
        assert site.entry is not None
        cache = site.entry.cache
        assert cache is not None
        past, width = (cache.layers, 2, cache.heads, cache.width), cache.heads * cache.width
        zero, normal = torch.nn.init.zeros_, torch.nn.init.normal_
        if self.hidden is None:
            return {"P": Param((self.n, *past), zero if self.init == "zero" else normal)}
        bounds = [width**-0.5, self.hidden**-0.5]
        first, last = (partial(torch.nn.init.uniform_, a=-b, b=b) for b in bounds)
        return {
            "E": Param((self.n, width), normal),
            "W1": Param((self.hidden, width), kaiming),
            "b1": Param((self.hidden,), first),
            "W2": Param((*past, self.hidden), zero if self.init == "zero" else kaiming),
            "b2": Param(past, zero if self.init == "zero" else last),
        }

    def past(self, **theta: Tensor) -> Tensor:
        if self.hidden is None:
            return theta["P"]
        h = torch.tanh(F.linear(theta["E"], theta["W1"], theta["b1"]))
        flat = F.linear(h, theta["W2"].flatten(0, -2), theta["b2"].flatten())
        return flat.unflatten(-1, theta["b2"].shape)
