"""BitFit: the biases that a layer has are trained; nothing is added to layers without one."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import Method


@dataclass(frozen=True)
class Bitfit(Method):
    """b  ->  trained  (Ben Zaken et al. 2021)"""

    kinds = frozenset({"linear", "conv", "norm"})
    trains = ("bias",)
    paper = "https://arxiv.org/abs/2106.10199"
