"""IST: adapters of a few blocks train at a time, of those that the loss misses most."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewrite.draws import draw
from rewrite.method import Method, arg
from rewrite.methods.lisa import Lisa

if TYPE_CHECKING:
    from rewrite.runtime.regimes import Moment
    from rewrite.sites import Site

ADAPTERS = {"delta", "weight", "output", "input"}


@dataclass(frozen=True)
class Ist(Lisa):
    """adapters of `active` blocks train, p_i ~ sigma(-I_i); I_i += rate (e^-l_k - mean) sigma'(I_i), i muted in run k

    (Yao et al. 2024.)  Every `every` steps the adapters of a random half of the blocks, p_i ~ sigma(I_i), are turned
    down to `scale` of what they do, `trials` times, and the losses l_k move I: it grows where the loss does not mind.
    The constants, and that a small I is an important block, are those of a public copy of the authors' callback.  It
    draws anew in every step; here a draw stands for `every` steps, out of at most `sets`, as each is a graph.
    `rewrite.step(model, optimizer, loss=...)` gives it the loss.
    """

    active: int = arg(8, low=1, help="blocks whose adapters train at a time")
    every: int = arg(10, low=1, help="steps between draws")
    trials: int = arg(3, low=2, help="losses measured for one update of the importance")
    share: float = arg(0.5, above=0, below=1, help="of the blocks, to be turned down in a trial")
    scale: float = arg(0.25, low=0, below=1, help="what their adapters are scaled by")
    rate: float = arg(10.0, above=0, help="of the update")

    measures = True
    paper = "https://arxiv.org/abs/2410.11772"

    def beside(self, others: Sequence[Method], sites: Sequence[Site]) -> str | None:
        if not any(other.view() in ADAPTERS for other in others):
            return "it is about adapters: add lora(r=8)@linear-head"
        return super().beside(others, sites)

    def choose(self, now: Moment) -> Collection[int] | None:
        if now.step % self.every:
            return None
        importance = now.memory.setdefault("importance", torch.zeros(len(now.groups), dtype=torch.float64))
        if now.step:
            self.measure(now, importance)
        return draw(torch.sigmoid(-importance), self.active, self.pool(now), now.random(1, now.step))

    def measure(self, now: Moment, importance: torch.Tensor) -> None:
        """Move the importance by what the loss is without a part of the adapters."""
        count = max(1, math.floor(self.share * len(importance)))
        runs: dict[tuple[int, ...], float] = {}
        number, most = 0, min(self.trials, math.comb(len(importance), count))
        while len(runs) < most:  # different ones
            chosen, number = draw(torch.sigmoid(importance), count, None, now.random(2, now.step, number)), number + 1
            if chosen not in runs:
                runs[chosen] = math.exp(-now.measured(dict.fromkeys(chosen, self.scale)))
        mean = sum(runs.values()) / len(runs)
        for chosen, value in runs.items():
            part = torch.sigmoid(importance[list(chosen)])
            importance[list(chosen)] += self.rate * (value - mean) * part * (1 - part)
