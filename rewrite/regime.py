"""What says how a model is trained: which of what trains is at work now, and what its gradients are made of.

A regime is a policy (`rewrite.method`).  It trains nothing by itself: it is about what the other clauses of a spec
train.  Where none of them trains anything it is about the whole model, but for what is stored in another format.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from rewrite.method import Method, states

if TYPE_CHECKING:
    from rewrite.runtime.regimes import Moment
    from rewrite.sites import Site


class Regime(Method):
    """Base class of methods that say how the others are trained.

    `choose` says which groups of tensors are at work: a group is a site where the method takes sites (blocks), and one
    tensor where it does not.  `gradient` is `exact`, `zeroth` (no backward at all) or `fused` (applied in it).
    """

    policy = True
    kinds: ClassVar[frozenset[str]] = frozenset()
    gradient: ClassVar[Literal["exact", "zeroth", "fused"]] = "exact"
    measures: ClassVar[bool] = False  # it turns adapters down to see what they are worth
    counts: ClassVar[bool] = False  # it asks what gradients cost
    reads_gradients: ClassVar[bool] = False  # in `choose`, after a step

    def choose(self, now: Moment) -> Collection[int] | None:
        """The numbers of the groups that are at work from now on; None for those of before."""

    def choices(self, count: int) -> int | None:
        """How many different choices it makes of `count` groups, at most: each is a graph to compile; None: unknown."""
        return 1

    def beside(self, others: Sequence[Method], sites: Sequence[Site]) -> str | None:
        for other in others:
            if isinstance(other, Regime) and (reason := self._with(other)) is not None:
                return reason
            if self.gradient != "exact" and states(other, "schedule"):
                return f"{other.name} looks at gradients after a step, and {self.name} {_WITHOUT[self.gradient]}"
        return None

    def _with(self, other: Regime) -> str | None:
        if type(self) is type(other):
            return f"{self.name} is there twice"
        if states(self, "choose", Regime) and states(other, "choose", Regime):
            return f"{other.name} says already what is at work"
        if self.gradient != "exact" and other.gradient != "exact":
            return f"{other.name} says already how gradients are made and used"
        if self.gradient != "exact" and other.reads_gradients:
            return f"{other.name} looks at gradients after a step, and {self.name} {_WITHOUT[self.gradient]}"
        return None


_WITHOUT = {"zeroth": "has none", "fused": "has freed them by then"}
