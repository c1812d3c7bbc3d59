"""MiSS: one shard of a matrix, shared by all pieces of the input."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Form, Tiled
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Miss(Method):
    """W + [D' D' ... D'], cut off at d_in  (Kang et al. 2024)"""

    r: int = arg(64, above=0, help="size of a piece of the input")
    mini: int | None = arg(None, above=0, help="outputs that D is for; it repeats over the others")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2409.15371"

    def params(self, site: Site) -> dict[str, Param]:
        return {"D": Param((*site.leading, self.r, self.mini or site.out_features))}

    def delta(self, D: Tensor, shape: tuple[int, int]) -> Form:
        return Tiled(Tiled(D, shape[0]).materialise().transpose(-2, -1), shape[1])
