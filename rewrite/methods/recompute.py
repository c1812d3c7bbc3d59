"""Recompute: what lies between these sites is not saved, the backward computes it again."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import Method
from rewrite.passes.keep import Recomputed, Rule


@dataclass(frozen=True)
class Recompute(Method):
    """save(f(x))  ->  compute f(x) again in the backward  (Chen et al. 2016)"""

    policy = True
    default_sites = "blocks"
    kinds = frozenset({"linear", "norm", "conv", "expert", "embedding", "block", "other"})
    paper = "https://arxiv.org/abs/1604.06174"

    def keeps(self, marked: bool) -> Rule:
        return Recomputed()
