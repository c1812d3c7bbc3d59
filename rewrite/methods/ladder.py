"""Ladder side-tuning: a narrow network beside the model, gated between its own stream and the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rewrite import rungs
from rewrite.blocks import Block
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.runtime.side import Call
from rewrite.sites import Site


@dataclass(frozen=True)
class Ladder(Method):
    """y + U norm(s_L), s_i = f_i(a s_{i-1} + (1 - a) D_i h_i), a = sigmoid(mu_i / T)  (Sung et al. 2022)

    f_i is a block with every width of the model's own divided by `reduction`; nothing of the model is in the backward
    pass.  It joins by addition with U = 0, so that training starts at the model as it is, where the paper replaces the
    stream.  Relative position biases (T5) are left out: what is tapped knows its position.
    """

    reduction: int = arg(8, low=1, help="what every width is divided by")
    gate: Literal["scalar", "vector"] = arg("scalar", help="one gate for a rung, or one for each of its channels")
    T: float = arg(0.1, above=0, help="temperature of the gates")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping in its blocks, in training")
    init: Literal["pruned", "random"] = arg("pruned", help="start from the largest parts of the model's blocks")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    reads = True
    paper = "https://arxiv.org/abs/2206.06522"

    def fits(self, site: Site) -> str | None:
        return rungs.refusal(site, self.reduction)

    def params(self, site: Site) -> dict[str, Param]:
        block = site.block
        assert block is not None
        n = block.width // self.reduction
        down = {"D": Param((n, block.width), kaiming), "b": Param((n,), decay=False)}
        if site.part == "entry":
            return down
        if site.part == "rung":
            mu = Param((n,) if self.gate == "vector" else (), decay=False)
            return down | {"mu": mu} | rungs.params(block, self.reduction)
        up = {"U": Param((block.width, n)), "c": Param((block.width,), decay=False)} if site.part == "end" else {}
        return rungs.norm_params(block, self.reduction) | up

    def start(
        self, sites: Sequence[Site], weights: Sequence[Mapping[str, Tensor]], theta: Sequence[Mapping[str, Tensor]]
    ) -> None:
        if self.init == "pruned":
            rungs.prune(sites, weights, theta, self.reduction)

    def tap(self, h: Tensor, D: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, D.to(h.dtype), b.to(h.dtype))

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        if s is None:
            return t
        a = torch.sigmoid(theta["mu"] / self.T).to(t.dtype)
        return rungs.apply(a * s + (1 - a) * t, call, block, theta, self.dropout)

    def close(self, s: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        return rungs.normed(s, theta, "n")

    def join(self, y: Tensor, s: Tensor, U: Tensor, c: Tensor) -> Tensor:
        return y + F.linear(s.to(y.dtype), U.to(y.dtype), c.to(y.dtype))
