"""Budget: a bound on what a step saves; the compiler recomputes what is cheapest to compute again."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import Method, arg
from rewrite.passes.keep import Budgeted, Rule


@dataclass(frozen=True)
class Budget(Method):
    """save(all)  ->  save at most a fraction of it, chosen to recompute the least

    1 is what the compiler saves by itself, 0 the inputs alone.
    """

    fraction: float = arg(0.5, low=0, high=1, positional=True, help="of what would be saved")

    policy = True
    kinds = frozenset()

    def keeps(self, marked: bool) -> Rule:
        return Budgeted(fraction=self.fraction)
