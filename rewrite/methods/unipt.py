"""UniPT: every block's output, narrowed, weighed by how it agrees with the last one."""

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

Taps = tuple[Tensor, ...]


@dataclass(frozen=True)
class Unipt(Method):
    """y + U relu(a + norm(W sum_l c_l z_l)), z_l = (I + l1(relu(a t_l'))) t_l, t_l = norm(D_l h_l)  (Diao et al. 2024)

    a = t_L is the anchor, c = softmax over l of v (mean a * mean t_l).  All layers are seen at once: there is no chain
    from rung to rung.  In a causal model a token's sums and means are over the tokens that it sees.  It joins by
    addition with U = 0, where the paper replaces the stream.  Beside an encoder it reaches the loss through the
    decoder, whose backward pass is then computed: `unipt@dec.blocks` is beside the decoder alone.
    """

    reduction: int = arg(2, low=1, help="what the width of the taps is divided by")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    paper = "https://arxiv.org/abs/2308.14316"

    def fits(self, site: Site) -> str | None:
        return rungs.refusal(site, self.reduction)

    def params(self, site: Site) -> dict[str, Param]:
        assert site.block is not None
        d, m = site.block.width, site.block.width // self.reduction
        gain = {"n": Param((m,), torch.nn.init.ones_, decay=False), "nb": Param((m,), decay=False)}
        if site.part != "end":
            return {"D": Param((m, d), kaiming), "b": Param((m,), decay=False)} | gain
        return {"W": Param((m, m), kaiming), "v": Param((1, m), kaiming), "U": Param((d, m))} | gain

    def tap(self, h: Tensor, D: Tensor, b: Tensor, n: Tensor, nb: Tensor) -> Tensor:
        return rungs.tap(h, D, b, n, nb)

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> tuple[Taps, Tensor]:
        past = call.recall(t.unsqueeze(1), t.unsqueeze(1))[0].squeeze(1)
        return (*(s[0] if s is not None else ()), past), t

    def close(self, s: Any, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        taps, a = s
        seen = call.allowed(a.shape[-2], taps[-1])
        mean = _mean(taps[-1], seen)
        found = torch.stack([_interaction(a, t, seen) for t in taps])
        v = theta["v"].to(a.dtype)
        c = torch.stack([F.linear(mean * _mean(t, seen), v) for t in taps]).softmax(0)
        z = F.linear((c * found).sum(0), theta["W"].to(a.dtype))
        n, nb = (theta[name].to(a.dtype) for name in ("n", "nb"))
        return F.relu(a + F.layer_norm(z, (n.shape[0],), n, nb))

    def join(self, y: Tensor, s: Tensor, U: Tensor) -> Tensor:
        return y + F.linear(s.to(y.dtype), U.to(y.dtype))


def _interaction(a: Tensor, t: Tensor, seen: Tensor | None) -> Tensor:
    """Every token of a layer, and what it sees of the layer in proportion to how that agrees with the anchor."""
    A = F.relu(a @ t.transpose(-1, -2))
    A = A if seen is None else A * seen
    return t[:, -a.shape[1] :] + (A / A.sum(-1, keepdim=True).clamp_min(1e-6)) @ t


def _mean(t: Tensor, seen: Tensor | None) -> Tensor:
    """The mean of the tokens that each one sees."""
    if seen is None:
        return t.mean(1, keepdim=True)
    weights = seen.to(t.dtype)
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1)) @ t
