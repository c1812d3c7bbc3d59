"""Full: the base tensors of a site are trained as they are."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import Method


@dataclass(frozen=True)
class Full(Method):
    """W, b  ->  trained"""

    positional_sites = True
    trains = True
    kinds = frozenset({"linear", "norm", "embedding", "conv", "other"})
