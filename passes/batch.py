"""batch: adapters that share an input become one down-projection (q, k, v; gate and up)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rewrite.passes.operators import linear
from rewrite.passes.pattern import Captures, Pattern
from rewrite.passes.rule import rule


class Shrink(Pattern):
    """A down-projection of an adapter: `linear(x, A)` that `insert` made, without a bias, narrower than x."""

    inner = linear("x", "A")

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        if not isinstance(node, fx.Node) or node.meta.get("rule") != "insert":
            return None
        found = self.inner.match(node, captures, matched, root)
        if found is None or not isinstance(found["A"], fx.Node):
            return None
        rows, columns = found["A"].meta["example_value"].shape
        return found if rows < columns else None

    def names(self) -> set[str]:
        return self.inner.names()


@rule(Shrink(), group="x")
def batch(r: Any, x: Any, A: Any) -> Any:
    """linear(x, A1), linear(x, A2), ...  ->  split(linear(x, cat(A1, A2, ...)))"""
    if len(A) < 2:
        return None
    h = F.linear(x, torch.cat(list(A)))
    parts = h.split([a.shape[0] for a in A], dim=-1)
    return [parts[i] for i in range(len(A))]
