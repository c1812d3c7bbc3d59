"""SpIEL: a sparse update whose weakest entries move, every few steps, to where the gradient asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.forms import Coordinates, Form, scattered
from rewrite.method import Method, Param, Tensor, arg
from rewrite.places import coordinates, flat
from rewrite.sites import Site


@dataclass(frozen=True)
class Spiel(Method):
    """W + S, S zero but for v at a share of places; `rewrite.step` moves the smallest |v|  (Ansell et al. 2024)

    Where to is read off row and column accumulators r, c of the squared gradients of v (SM3, Anil et al. 2019), by the
    product r_i c_j: no gradient of a dense weight is ever formed.  All places move at the first time, then a share of
    them that falls to 0.  An update that is dropped is lost.
    """

    density: float = arg(0.01, above=0, high=1, help="share of the entries of a weight")
    every: int = arg(20, low=1, help="steps between two moves")
    drop: float = arg(0.2, above=0, high=1, help="share of the places that move, at step 0")
    steps: int = arg(1000, low=1, help="optimizer steps of the whole training (rewrite.step counts them)")
    seed: int | None = arg(None, low=0, help="of the places at the start; none is that of an unseeded generator")

    kinds = frozenset({"linear", "conv", "embedding"})
    paper = "https://arxiv.org/abs/2401.16405"

    def params(self, site: Site) -> dict[str, Param]:
        d_out, d_in = site.out_features, site.in_features
        count = max(1, int(self.density * d_out * d_in))
        return {
            "v": Param((count,)),
            "at": Param(
                (2, count),
                lambda at: at.copy_(scattered(count, d_out, d_in, self.seed)),
                trainable=False,
                dtype=torch.int32,
            ),
            "rows": Param((d_out,), trainable=False),
            "columns": Param((d_in,), trainable=False),
        }

    def delta(self, v: Tensor, at: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Form:
        return Coordinates(v, at.select(0, 0), at.select(0, 1), *shape)

    def schedule(
        self, step: int, sites: Sequence[Mapping[str, Tensor]], memory: dict[Any, Any]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        for site in sites:
            self.accumulate(**site)
            if step % self.every == 0 and step < self.steps:
                yield site["v"], self.move(step, **site)

    def accumulate(self, v: Tensor, at: Tensor, rows: Tensor, columns: Tensor) -> None:
        """SM3: an entry has had min(r_i, c_j) and its square more; a row and a column have the most of theirs."""
        if v.grad is None:
            return
        i, j = at.to(torch.int64)
        had = torch.minimum(rows[i], columns[j]) + v.grad.to(rows.dtype).square()
        rows.scatter_reduce_(0, i, had, "amax")
        columns.scatter_reduce_(0, j, had, "amax")

    def move(self, step: int, v: Tensor, at: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Move the smallest entries to the best free places; returns which of v have moved."""
        share = 1.0 if step == self.every else self.drop * (1 - step / self.steps)
        count = int(share * v.numel())
        gone = v.abs().argsort(stable=True)[:count]
        moved = torch.zeros_like(v, dtype=torch.bool).index_fill_(0, gone, True)
        scores = torch.outer(rows, columns).flatten()
        scores[flat(at[:, ~moved], len(columns))] = -1
        at[:, gone] = coordinates(scores.topk(count).indices, len(columns)).to(at.dtype)
        v.masked_fill_(moved, 0)
        return moved
