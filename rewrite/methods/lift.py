"""LIFT: the entries that are largest in a low-rank approximation of the weight are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Coordinates, Form
from rewrite.method import Method, Param, Tensor, arg
from rewrite.places import coordinates, flat, largest, low_rank
from rewrite.sites import Site


@dataclass(frozen=True)
class Lift(Method):
    """W + S, S zero but for v where the rank-q approximation of W is largest  (Liu et al. 2025)

    Every few steps the entries are chosen anew, from W + S (`rewrite.step`).  Those that are chosen no longer keep
    what they learned and rest; new ones take places of `spare` numbers, and when none is left they stay as they are.
    Not the LIFT that trains one layer at a time.
    """

    r: int = arg(128, low=1, help="as many numbers as a low-rank update of this rank; all, where the weight has fewer")
    rank: int = arg(128, low=1, help="q, of the approximation")
    every: int = arg(0, low=0, help="steps between two choices; 0: one choice, at the start")
    spare: float = arg(1.0, low=0, help="places for entries that are chosen later, as a multiple of the first ones")

    kinds = frozenset({"linear", "embedding"})
    paper = "https://arxiv.org/abs/2506.00772"

    def params(self, site: Site) -> dict[str, Param]:
        d_out, d_in = site.out_features, site.in_features
        held = min(int(self.count(site) * (1 + (self.spare if self.every else 0))), d_out * d_in)
        return {
            "v": Param((held,), decay=False),
            "at": Param((2, held), trainable=False, dtype=torch.int32),
            "active": Param((held,), trainable=False, dtype=torch.bool),
        }

    def count(self, site: Site) -> int:
        return min(self.r * (site.out_features + site.in_features), site.out_features * site.in_features)

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        # The first ones are active; spare places stand where nothing does, at the next largest entries.
        held, first = theta["v"].numel(), min(self.r * sum(W.shape), W.numel())
        scores = low_rank(W, self.rank).abs()
        chosen = largest(scores, first)
        scores[chosen[0], chosen[1]] = -1
        theta["at"].copy_(torch.cat([chosen, largest(scores, held - first)], dim=1))
        theta["active"].copy_(torch.arange(held, device=W.device) < first)

    def delta(self, v: Tensor, at: Tensor, active: Tensor, shape: tuple[int, int]) -> Form:
        # What rests has a value and no gradient.
        return Coordinates(torch.where(active, v, v.detach()), at.select(0, 0), at.select(0, 1), *shape)

    def reselect(
        self, step: int, W: Callable[[], Tensor], theta: dict[str, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor]] | None:
        if not self.every or step % self.every:
            return None
        now = W()
        first = min(self.r * sum(now.shape), now.numel())
        chosen = flat(largest(low_rank(now, self.rank).abs(), first), now.shape[1])
        changed = self.activate(chosen, now.shape[1], **theta)
        return [(theta["v"], changed)]

    def activate(self, chosen: Tensor, columns: int, v: Tensor, at: Tensor, active: Tensor) -> Tensor:
        """Let the chosen entries train and the others rest; returns whose training begins or ends."""
        before, held = active.clone(), flat(at, columns)
        active.copy_(torch.isin(held, chosen))
        new = chosen[~torch.isin(chosen, held)]
        free = (~active & ~before & (v == 0)).nonzero().flatten()[: len(new)]
        at[:, free] = coordinates(new[: len(free)], columns).to(at.dtype)
        active[free] = True
        return active != before
