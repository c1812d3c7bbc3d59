"""SaRA: the smallest weights, which do the least, are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.forms import Coordinates, Form
from rewrite.errors import RewriteError
from rewrite.method import Method, Param, Tensor, arg
from rewrite.places import largest
from rewrite.sites import Site


@dataclass(frozen=True)
class Sara(Method):
    """W + S, S zero but for v where |W| is small  (Hu et al. 2024); without the nuclear norm in its loss.

    At step `refresh` those that have grown beyond the limit rest, with what they learned, and the others start anew.
    """

    theta: float | None = arg(
        None, above=0, help="below which an entry is trained (2e-3 in the paper); none: `share` decides"
    )
    share: float = arg(0.05, above=0, high=1, help="of a weight that is trained at most: its smallest entries")
    refresh: int = arg(2500, low=0, help="the step after which the choice is made again; 0: never")

    kinds = frozenset({"linear", "conv", "embedding"})
    paper = "https://arxiv.org/abs/2409.06633"

    def params(self, site: Site) -> dict[str, Param]:
        held = max(1, int(self.share * site.out_features * site.in_features))
        return {
            "v": Param((held,), decay=False),
            "at": Param((2, held), trainable=False, dtype=torch.int32),
            "active": Param((held,), trainable=False, dtype=torch.bool),
            "W": Param((held,), trainable=False),
        }

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        at = largest(-W.abs(), theta["v"].numel())
        theta["at"].copy_(at)
        theta["W"].copy_(W[at[0], at[1]])
        active = self.below(theta["W"], theta["W"])
        if not active.any():
            smallest = float(theta["W"].abs().min())
            raise RewriteError(
                f"sara(theta={self.theta}): no entry of a weight is below it, the smallest is {smallest:.2g}"
            )
        theta["active"].copy_(active)

    def below(self, now: Tensor, start: Tensor) -> Tensor:
        """Which entries are below the limit: theta, or what was the largest of them at the start."""
        return now.abs() <= start.abs().max() if self.theta is None else now.abs() < self.theta

    def delta(self, v: Tensor, at: Tensor, active: Tensor, W: Tensor, shape: tuple[int, int]) -> Form:
        # What rests has a value and no gradient.
        return Coordinates(torch.where(active, v, v.detach()), at.select(0, 0), at.select(0, 1), *shape)

    def schedule(
        self, step: int, sites: Sequence[Mapping[str, Tensor]], memory: dict[Any, Any]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        for site in sites if step == self.refresh else ():
            site["active"].logical_and_(self.below(site["W"] + site["v"], site["W"]))
            yield site["v"], torch.ones_like(site["active"])
