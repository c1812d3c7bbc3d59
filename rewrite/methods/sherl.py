"""SHERL: shallow layers are summarised without redundancy, and the last layer of the model is shown the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rewrite import rungs
from rewrite.blocks import Block
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.runtime.side import Call
from rewrite.sites import Site


@dataclass(frozen=True)
class Sherl(Method):
    """h + U relu(g + sum_l w_l x_l) into the last block, w_l = l1(relu(v (x_l * g)) / rho_l)  (Diao et al. 2024)

    x_l = norm(D_l h_l) for the blocks before the last, g = x_{L-1} the deepest of them, rho_l = sum_j relu(cos(x_l,
    x_j)) how much of x_l the others say too.  The backward pass goes through the last block alone.  It joins by
    addition with U = 0, so that training starts at the model as it is, where the paper's starts at the summary.  Beside
    an encoder it reaches the loss through the decoder: `sherl@dec.blocks` is beside the decoder alone.
    """

    reduction: int = arg(2, low=1, help="what the width of the taps is divided by")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    ends = "late"
    paper = "https://arxiv.org/abs/2407.07523"

    def fits(self, site: Site) -> str | None:
        return rungs.refusal(site, self.reduction)

    def params(self, site: Site) -> dict[str, Param]:
        assert site.block is not None
        d, m = site.block.width, site.block.width // self.reduction
        if site.part == "late":
            return {"v": Param((1, m), kaiming), "U": Param((d, m))}
        gain = {"n": Param((m,), torch.nn.init.ones_, decay=False), "nb": Param((m,), decay=False)}
        return {"D": Param((m, d), kaiming), "b": Param((m,), decay=False)} | gain

    def tap(self, h: Tensor, D: Tensor, b: Tensor, n: Tensor, nb: Tensor) -> Tensor:
        return rungs.tap(h, D, b, n, nb)

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (*(s or ()), t)

    def close(self, s: Any, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        x, guide = torch.stack(s, -2), s[-1]  # (rows, tokens, layers, width)
        unit = F.normalize(x, dim=-1)
        redundancy = F.relu(unit @ unit.transpose(-1, -2)).sum(-1, keepdim=True)
        w = F.relu(F.linear(x * guide.unsqueeze(-2), theta["v"].to(x.dtype))) / redundancy.clamp_min(1e-6)
        w = w / w.sum(-2, keepdim=True).clamp_min(1e-6)
        return F.relu(guide + (w * x).sum(-2))

    def join(self, y: Tensor, s: Tensor, U: Tensor) -> Tensor:
        return y + F.linear(s.to(y.dtype), U.to(y.dtype))
