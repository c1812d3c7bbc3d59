"""Polytropon and multi-head routing: an inventory of low-rank skills, mixed by learned shares of a task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Poly(Method):
    """W + B A / r, A = sum_k w_k A_k, B = sum_k w_k B_k, w = sigmoid(z_task) / sum  (Ponti et al. 2023)

    With `splits`, every split of the inputs and of the outputs has shares of its own (Caccia et al. 2023).  The task is
    an argument, not one of each call, so that it merges; and training uses the mean of the gates, where HF PEFT draws
    from a relaxed Bernoulli distribution.
    """

    r: int = arg(8, low=1, help="rank of a skill")
    skills: int = arg(4, low=2, help="low-rank updates in the inventory")
    splits: int = arg(1, low=1, help="heads that mix the skills on their own")
    tasks: int = arg(1, low=1, help="rows of shares that are kept")
    task: int = arg(0, low=0, help="the row that is used and trained")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2202.13914"

    def check(self) -> str | None:
        return None if self.task < self.tasks else f"task={self.task} of tasks={self.tasks}, counted from 0"

    def fits(self, site: Site) -> str | None:
        sizes = (site.in_features, site.out_features)
        return f"splits={self.splits} does not divide {sizes}" if any(s % self.splits for s in sizes) else None

    def params(self, site: Site) -> dict[str, Param]:
        stack, columns = (*site.leading, self.splits, self.skills), site.in_features // self.splits
        bound = columns**-0.5
        return {
            "A": Param((*stack, columns, self.r), partial(torch.nn.init.uniform_, a=-bound, b=bound)),
            "B": Param((*stack, self.r, site.out_features // self.splits)),
            "logits": Param((self.tasks, self.splits * self.skills), partial(torch.nn.init.uniform_, a=-1e-3, b=1e-3)),
        }

    def delta(self, A: Tensor, B: Tensor, logits: Tensor) -> Form:
        shares = logits[self.task].sigmoid().unflatten(0, (self.splits, self.skills))
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("qs,...qsdr->...qdr", shares, A).flatten(-3, -2)
        B = torch.einsum("qs,...qsrd->...qrd", shares, B).transpose(-3, -2).flatten(-2)
        return LowRank(B.transpose(-1, -2), A.transpose(-1, -2)) * (1 / self.r)
