"""batch: adapters that share an input become one down-projection (q, k, v; gate and up).

Behind dropout each keeps a mask of its own, and the product computes them as it goes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rewrite.passes.operators import add, dropout, inserted, linear, mul, sub
from rewrite.passes.pattern import Captures, Pattern
from rewrite.passes.rule import rule


class Shrink(Pattern):
    """A down-projection of an adapter: `inner`, a `linear(x, A)` that `insert` made, without a bias, narrower than x.

    Not the product of a layer that a method states anew, `W x + b` or `d W x + ...`: W is no factor, and its copy
    beside factors would be as large as it is.
    """

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        if not isinstance(node, fx.Node) or not inserted(node):
            return None
        if _is_summed(node):
            return None
        found = self.inner.match(node, captures, matched, root)
        if found is None or not isinstance(found["A"], fx.Node):
            return None
        rows, columns = found["A"].meta["example_value"].shape
        return found if rows < columns else None

    def names(self) -> set[str]:
        return self.inner.names()


def _is_summed(node: fx.Node) -> bool:
    """Whether a value, itself or times something, is a term of a sum."""
    return any(
        add.arguments(user) or sub.arguments(user) or (mul.arguments(user) and _is_summed(user)) for user in node.users
    )


@rule(Shrink(linear("x", "A")), group="x")
def batch(r: Any, x: Any, A: Any) -> Any:
    """linear(x, A1), linear(x, A2), ...  ->  split(linear(x, cat(A1, A2, ...)))"""
    if len(A) < 2:
        return None
    different = list({a.node: a for a in A}.values())  # slices of one adapted weight share their A
    if len(different) == 1:
        return [F.linear(x, different[0])] * len(A)
    h = F.linear(x, torch.cat(different))
    parts = h.split([a.shape[0] for a in different], dim=-1)
    taken = {a.node: parts[i] for i, a in enumerate(different)}
    return [taken[a.node] for a in A]


@rule(Shrink(linear(dropout("x", "seed", "p"), "A")), group="x")
def batch_dropped(r: Any, x: Any, seed: Any, p: Any, A: Any) -> Any:
    """linear(dropout(x, s1, p), A1), ...  ->  split(dropped_linear(x, cat(A1, ...), cat(s1, ...), p))"""
    ranks = [a.shape[0] for a in A]
    if len(A) == 1:
        return [torch.ops.rewrite.dropped_linear(x, A[0], seed[0], ranks, p)]
    parts = torch.ops.rewrite.dropped_linear(x, torch.cat(A), torch.cat(seed), ranks, p).split(ranks, dim=-1)
    return [parts[i] for i in range(len(A))]


BATCH = (batch_dropped, batch)
