"""Visual query tuning: queries of our own ask every layer of a frozen model, and the head hears the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rewrite.blocks import Block
from rewrite.method import Method, Param, Tensor, arg
from rewrite.runtime.side import Call
from rewrite.sites import Site


@dataclass(frozen=True)
class Vqt(Method):
    """head(h) + sum_l H_l f_l(P_l; keys and values of X_l)  (Tu et al. 2023)

    The q rows of P_l go through block l, f_l, as queries alone, so that the tokens X_l never depend on them and only
    the rows are in the backward pass, with the keys and values that they saw.  A linear head on all answers beside the
    model's own is the sum of these products; H_l = 0 at the start.  Dropout inside of blocks is not drawn for the rows.
    """

    q: int = arg(1, low=1, help="queries in every layer")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    ends = "head"
    through = True
    paper = "https://arxiv.org/abs/2212.03220"

    def fits(self, site: Site) -> str | None:
        assert site.block is not None
        return "its tokens do not see those after them, and a query sees all of them" if site.block.causal else None

    def params(self, site: Site) -> dict[str, Param]:
        block = site.block
        assert block is not None
        if site.part != "rung" or block.head is None:
            return {}
        bound = math.sqrt(6 / (3 * 16**2 + block.width))  # as for prompts beside patches of 16 x 16
        return {
            "P": Param((self.q, block.width), partial(torch.nn.init.uniform_, a=-bound, b=bound)),
            "H": Param((block.head[1], self.q * block.width)),
        }

    def tap(self, h: Tensor, P: Tensor | None = None) -> Tensor:
        return h if P is None else torch.zeros_like(h[:, :1]) + P.to(h.dtype)

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if s is None:
            return ()
        assert call.rows is not None
        answers = call.rows.through(t).flatten(1)
        return (*s, F.linear(answers, theta["H"].to(t.dtype)))

    def close(self, s: Any, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(s).sum(0)

    def join(self, y: Tensor, s: Tensor) -> Tensor:
        for _ in range(y.ndim - s.ndim):  # a head of every token hears the same answers
            s = s.unsqueeze(1)
        return y + s.to(y.dtype)
