"""RoAd: the outputs of a layer rotated and scaled by pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rewrite.codegen.forms import Base, Form, Pairs
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Road(Method):
    """R (W x + b), R of blocks alpha [[cos theta, -sin theta], [sin theta, cos theta]]  (Liao & Monz 2024)"""

    variant: Literal["road_1", "road_2", "road_4"] = arg(
        "road_1", help="an angle and a scale for every pair, for every row of a block, or for every entry"
    )
    group: int = arg(64, low=2, help="channels whose halves are paired; the nearest even divisor of the outputs")

    kinds = frozenset({"linear", "embedding"})
    paper = "https://arxiv.org/abs/2409.00119"

    def size(self, n: int) -> int:
        """The size of a group among n channels; of n + 1 where n is odd: the last one is then paired with none."""
        sizes = [size for size in range(2, n + 2, 2) if (n + n % 2) % size == 0]
        return min(sizes, key=lambda size: abs(size - self.group))

    def params(self, site: Site) -> dict[str, Param]:
        shape = ((site.out_features + 1) // 2 * int(self.variant[-1]),)
        return {"theta": Param(shape), "alpha": Param(shape, torch.nn.init.ones_)}

    def rotation(self, n: int, theta: Tensor, alpha: Tensor) -> Form:
        group, copies = self.size(n), 2 if self.variant == "road_1" else 1
        # (groups, one for the diagonal and one beside it, halves, pairs), where road_4 alone has both.
        sides = (-1, 2 if self.variant == "road_4" else 1, 2 // copies, group // 2)
        cos, sin = (t.unflatten(0, sides).expand(-1, -1, 2, -1) for t in (alpha * theta.cos(), alpha * theta.sin()))
        return Pairs(cos.select(1, 0).flatten(), sin.select(1, -1).flatten(), group, n)

    def weight(self, W: Base, **theta: Tensor) -> Form:
        return self.rotation(W.shape[-2], **theta) @ W

    def shifted(self, W: Any, b: Tensor | None, **theta: Tensor) -> Tensor | None:
        return None if b is None else self.rotation(W.shape[-2], **theta).apply(b)
