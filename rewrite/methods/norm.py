"""LN tuning: the norms of a model are trained as they are."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import Method


@dataclass(frozen=True)
class Norm(Method):
    """gamma, beta  ->  trained  (Zhao et al. 2023)"""

    kinds = frozenset({"norm"})
    trains = True
    positional_sites = True
    default_sites = "norm"
    paper = "https://arxiv.org/abs/2312.11420"
