"""Quantized side tuning: a side network beside a model in 4 bits, whose taps cost next to nothing."""

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
class Qst(Method):
    """y + U norm(s_L), s_i = f_i(a s_{i-1} + (1 - a) norm(B silu(A h_i))), a = sigmoid(z_i)  (Zhang et al. 2024)

    Meant for a model in 4 bits: `qst@blocks + nf4(base)`.  A pooled tap has no tensors, so that nothing of the model's
    width is kept for the backward pass.  It joins by addition with U = 0, where the paper mixes two streams by b; that
    scale is in U.
    """

    reduction: int = arg(16, low=1, help="what every width is divided by")
    r: int = arg(16, low=1, help="rank of the taps")
    down: Literal["lowrank", "pool"] = arg("lowrank", help="taps learned in two factors, or means of neighbours")
    gate: Literal["vector", "scalar"] = arg("vector", help="a gate for each channel of a rung, or one")
    init: Literal["random", "pruned"] = arg("random", help="pruned: start from the largest parts of the model's blocks")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    reads = True
    paper = "https://arxiv.org/abs/2401.07159"

    def fits(self, site: Site) -> str | None:
        return rungs.refusal(site, self.reduction)

    def params(self, site: Site) -> dict[str, Param]:
        block = site.block
        assert block is not None
        n = block.width // self.reduction
        if site.part in ("end", "memory"):
            up = {"U": Param((block.width, n)), "c": Param((block.width,), decay=False)} if site.part == "end" else {}
            return rungs.norm_params(block, self.reduction) | up
        down = {"A": Param((self.r, block.width), kaiming), "B": Param((n, self.r), kaiming)}
        down |= {"m": Param((n,), torch.nn.init.ones_, decay=False), "mb": Param((n,), decay=False)}
        found = down if self.down == "lowrank" else {}
        if site.part == "entry":
            return found
        z = Param((n,) if self.gate == "vector" else (), lambda t: torch.nn.init.constant_(t, 0.5), decay=False)
        return found | {"z": z} | rungs.params(block, self.reduction)

    def start(
        self, sites: Sequence[Site], weights: Sequence[Mapping[str, Tensor]], theta: Sequence[Mapping[str, Tensor]]
    ) -> None:
        if self.init == "pruned":
            rungs.prune(sites, weights, theta, self.reduction)

    def tap(
        self,
        h: Tensor,
        A: Tensor | None = None,
        B: Tensor | None = None,
        m: Tensor | None = None,
        mb: Tensor | None = None,
    ) -> Tensor:
        width = h.shape[-1] // self.reduction
        if A is None or B is None or m is None or mb is None:
            return F.layer_norm(pooled(h, width), (width,))
        t = F.linear(F.silu(F.linear(h, A.to(h.dtype))), B.to(h.dtype))
        return F.layer_norm(t, (width,), m.to(h.dtype), mb.to(h.dtype))

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        if s is None:
            return t
        a = torch.sigmoid(theta["z"]).to(t.dtype)
        return rungs.apply(a * s + (1 - a) * t, call, block, theta)

    def close(self, s: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        return rungs.normed(s, theta, "n")

    def join(self, y: Tensor, s: Tensor, U: Tensor, c: Tensor) -> Tensor:
        return y + F.linear(s.to(y.dtype), U.to(y.dtype), c.to(y.dtype))


def pooled(h: Tensor, width: int) -> Tensor:
    """The means of so many groups of neighbouring channels, whose last ones are left out where they do not divide."""
    size = h.shape[-1] // width
    return h[..., : size * width].unflatten(-1, (width, size)).mean(-1)
