"""GreenTrainer: the tensors that bring the loss down most for a share of the operations."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewrite.knapsack import best
from rewrite.method import arg
from rewrite.regime import Regime

if TYPE_CHECKING:
    from rewrite.runtime.regimes import Costs, Moment

PROBE = 3
"""Steps with everything at work: one before the tensors are noted, one for their update, one for the next gradient."""
FLOOR = 0.05
"""The least share of the backward pass that is left, however small rho is."""


@dataclass(frozen=True)
class Green(Regime):
    """max sum I_k over trained k, FLOPs(dW_k) + FLOPs(chain to the deepest) <= rho' B,  I_k = -g_k . dtheta_k

    (Huang et al. 2023.)  `rho` is the share of a full training step: rho' = rho (1 + F/B) - F/B, F the forward pass and
    B the backward one.  The update is that of one real step and the gradient that of the next; costs are counted on the
    joint graph of a step like the last one.  All tensors train for three steps, then those of a knapsack, until `every`
    steps have passed and it is done anew.  Alone it is about the whole model, else about what the other clauses train.
    """

    rho: float = arg(0.5, above=0, high=1, help="share of the operations of a training step")
    every: int | None = arg(None, low=PROBE + 1, help="steps between selections; none: one selection")

    counts = True
    reads_gradients = True
    paper = "https://arxiv.org/abs/2309.13192"

    def choices(self, count: int) -> int | None:
        return 2 if self.every is None else None

    def choose(self, now: Moment) -> Collection[int] | None:
        step = now.step if self.every is None else now.step % self.every
        if step == 0:
            return range(len(now.groups))
        if step == PROBE - 2:
            now.memory["theta"] = [p.detach().clone() for (p,) in now.groups]
        elif step == PROBE - 1:
            now.memory["theta"] = [p.detach() - old for (p,), old in zip(now.groups, now.memory["theta"], strict=True)]
        elif step == PROBE:
            importance = [
                self.importance(p, moved) for (p,), moved in zip(now.groups, now.memory["theta"], strict=True)
            ]
            now.memory.clear()
            return self.selected(importance, now.costs())
        return None

    def importance(self, parameter: torch.Tensor, moved: torch.Tensor) -> float:
        return 0.0 if parameter.grad is None else -float((parameter.grad.double() * moved.double()).sum())

    def selected(self, importance: list[float], costs: Costs) -> list[int]:
        """The tensors that train from now on; the most important of those that fit, or of all, where there is none."""
        largest = max(map(abs, importance), default=0.0) or 1.0
        values = [0.0 if c.group is None else importance[c.group] / largest for c in costs.gradients]
        own, chain = [c.own for c in costs.gradients], [c.chain for c in costs.gradients]
        chosen = [costs.gradients[n].group for n in best(values, own, chain, self.share(costs) * costs.backward)]
        found = [group for group in chosen if group is not None]
        return found or [max(range(len(importance)), key=lambda n: importance[n])]

    def share(self, costs: Costs) -> float:
        """The share of the backward pass that leaves `rho` of a step."""
        ratio = costs.forward / costs.backward if costs.backward else math.inf
        return max(FLOOR, self.rho * (1 + ratio) - ratio)
