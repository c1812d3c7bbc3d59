"""HRA: the inputs of a layer reflected r times.

Its Gram-Schmidt variant is not here: r orthogonal reflections are never the identity, so it cannot start at the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Base, Form, Householder
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


def paired(U: Tensor) -> None:
    """Columns that are equal by twos: their reflections cancel."""
    half = kaiming(U.new_empty(*U.shape[:-1], U.shape[-1] // 2))
    U.copy_(half.repeat_interleave(2, dim=-1))


@dataclass(frozen=True)
class Hra(Method):
    """W H_1 ... H_r, H_i = I - 2 u_i u_i' / |u_i|^2  (Yuan et al. 2024)"""

    r: int = arg(8, low=2, help="number of reflections, rank of what they change; even, so that they start as pairs")

    kinds = frozenset({"linear", "conv", "expert"})
    paper = "https://arxiv.org/abs/2405.17484"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return f"r must be even, got {self.r}: reflections start as pairs that cancel" if self.r % 2 else None

    def params(self, site: Site) -> dict[str, Param]:
        return {"U": Param((*site.leading, site.in_features, self.r), paired)}

    def weight(self, W: Base, U: Tensor) -> Form:
        return W @ Householder.reflections(U)
