"""LISA: a few random blocks train at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.draws import draw, pool
from rewrite.method import Method, arg
from rewrite.regime import Regime

if TYPE_CHECKING:
    from rewrite.runtime.regimes import Moment
    from rewrite.sites import Site


@dataclass(frozen=True)
class Lisa(Regime):
    """W, b of `active` random blocks, drawn anew every `every` steps, and of all that is in no block  (Pan et al. 2024)

    Alone it trains the whole model.  Beside other clauses it is about what they train: `lora@linear + lisa`.  Every
    different set of blocks is a graph of its own, so there are at most `sets` of them (enough to reach every block),
    cut out of random orders; with `sets=none`, as in the paper, every draw is free.
    """

    active: int = arg(2, low=1, help="blocks that train at a time")
    every: int = arg(20, low=1, help="steps between draws")
    sets: int | None = arg(32, low=1, help="different sets of blocks at most; none: any")

    kinds = frozenset({"block"})
    default_sites = "blocks"
    paper = "https://arxiv.org/abs/2403.17919"

    def beside(self, others: Sequence[Method], sites: Sequence[Site]) -> str | None:
        if self.active > len(sites):
            return f"active={self.active} is more than its {len(sites)} blocks"
        return super().beside(others, sites)

    def choices(self, count: int) -> int:
        every = math.comb(count, self.active)
        return every if self.sets is None else min(every, max(self.sets, math.ceil(count / self.active)))

    def choose(self, now: Moment) -> Collection[int] | None:
        if now.step % self.every:
            return None
        return draw([1.0] * len(now.groups), self.active, self.pool(now), now.random(1, now.step))

    def pool(self, now: Moment) -> list[tuple[int, ...]] | None:
        """The sets of blocks that there are; None for all that are possible."""
        if "pool" not in now.memory:
            count = len(now.groups)
            sets = None if self.sets is None else self.choices(count)
            now.memory["pool"] = pool(count, self.active, sets, now.random(0))
        return now.memory["pool"]
