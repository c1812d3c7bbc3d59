"""AdaLoRA: a rank budget that moves, while training, to the sites that need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import init

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Adalora(Method):
    """y + s B diag(E) A x, s = alpha / (r + 1e-5); the least important entries of E rest  (Zhang et al. 2023)"""

    r: int = arg(12, low=1, help="rank at the start")
    target: int = arg(8, low=1, help="average rank at the end")
    alpha: float = arg(1.0, above=0, help="numerator of the scale")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    steps: int = arg(1000, low=1, help="optimizer steps of the whole training (rewrite.step counts them)")
    warmup: int = arg(0, low=0, help="first steps, at full rank")
    final: int = arg(0, low=0, help="last steps, with the ranks as they are then")
    every: int = arg(1, low=1, help="steps between two allocations")
    beta1: float = arg(0.85, above=0, below=1, help="smoothing of the sensitivity of an entry")
    beta2: float = arg(0.85, above=0, below=1, help="smoothing of its uncertainty")
    orthogonal: float = arg(0.5, low=0, help="weight of |A A' - 1| + |B' B - 1| in rewrite.regulariser")

    kinds = frozenset({"linear", "conv", "expert"})
    paper = "https://arxiv.org/abs/2303.10512"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return None if self.warmup + self.final < self.steps else "warmup and final leave no step for the schedule"

    def params(self, site: Site) -> dict[str, Param]:
        small = partial(init.normal_, std=0.02)
        return {
            "A": Param((*site.leading, self.r, site.in_features), small),
            "B": Param((*site.leading, site.out_features, self.r), small),
            "E": Param((*site.leading, self.r, 1)),
        }

    def delta(self, A: Tensor, B: Tensor, E: Tensor) -> Form:
        return LowRank(B, A * E) * (self.alpha / (self.r + 1e-5))

    def regulariser(self, A: Tensor, B: Tensor, E: Tensor) -> Tensor:
        one = torch.eye(self.r, dtype=A.dtype, device=A.device)
        return self.orthogonal * (torch.linalg.norm(A @ A.mT - one) + torch.linalg.norm(B.mT @ B - one)) / 2

    def budget(self, step: int) -> float:
        """The share of the entries of E that step number `step` leaves at work."""
        length = self.steps - self.final - self.warmup
        left = 1 - min(max((step - self.warmup) / length, 0.0), 1.0)
        target = min(self.target / self.r, 1.0)
        return target + (1 - target) * left**3

    def schedule(
        self, step: int, sites: Sequence[Mapping[str, Tensor]], memory: dict[Any, Any]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        if step < self.steps - self.final:
            scores = [self.importance(site, memory.setdefault(n, {})) for n, site in enumerate(sites)]
            if step > self.warmup and step % self.every == 0:
                memory["resting"] = self.resting(scores, step)
        for site, rest in zip(sites, memory.get("resting", ()), strict=False):
            site["E"].masked_fill_(rest, 0)
            yield site["E"], rest

    def resting(self, scores: Sequence[Tensor], step: int) -> list[Tensor]:
        """Which entries of each E are beyond the budget: the least important of all sites."""
        flat = torch.cat([s.flatten() for s in scores])
        count = flat.numel() - int(flat.numel() * self.budget(step))
        order = torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.argsort(stable=True)[:count], True)
        parts = order.split([s.numel() for s in scores])
        return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]

    def importance(self, site: Mapping[str, Tensor], memory: dict[str, Tensor]) -> Tensor:
        """The importance of every entry of E, with what its row of A and its column of B add to it."""
        score = {}
        for name in ("A", "B", "E"):
            grad = site[name].grad
            now = torch.zeros_like(site[name]) if grad is None else (site[name] * grad).abs()
            mean = memory.setdefault(f"{name}.mean", torch.zeros_like(now)).lerp_(now, 1 - self.beta1)
            spread = memory.setdefault(f"{name}.spread", torch.zeros_like(now)).lerp_(
                (now - mean).abs(), 1 - self.beta2
            )
            score[name] = mean * spread
        return score["E"] + score["A"].mean(-1, keepdim=True) + score["B"].mean(-2, keepdim=True).mT
