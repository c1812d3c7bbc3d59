"""GLoRA: a weight and a bias, each scaled and shifted, and a prompt through the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rewrite.codegen.forms import Diagonal, Form, Hadamard, LowRank
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Glora(Method):
    """W + W o A + B and b + b o D + E + W C; C, D and E where there is a bias  (Chavan et al. 2023)"""

    r: int = arg(8, low=1, help="rank of what is low-rank")
    ab: Literal["lora", "vector", "constant"] | None = arg(
        "lora", help="A and B: low-rank, one number an output, or one"
    )
    c: Literal["lora", "vector"] | None = arg("lora", help="C: a product of two factors, or a vector")
    de: Literal["vector", "constant"] | None = arg("constant", help="D and E: one number an output, or one")

    paper = "https://arxiv.org/abs/2306.07967"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return "there is nothing to train" if not (self.ab or self.c or self.de) else None

    def params(self, site: Site) -> dict[str, Param]:
        rows, columns, r = site.out_features, site.in_features, self.r
        sizes: dict[str | None, tuple[int, ...]] = {"vector": (rows,), "constant": (1,)}
        theta: dict[str, Param] = {}
        for name in ("A", "B") if self.ab else ():
            if self.ab == "lora":
                theta |= {f"{name}d": Param((rows, r)), f"{name}u": Param((r, columns), kaiming)}
            else:
                theta[name] = Param(sizes[self.ab])
        if "bias" not in dict(site.place.tensors):
            return theta
        if self.c == "lora":
            theta |= {"Cd": Param((columns, r)), "Cu": Param((r, 1), kaiming)}
        elif self.c:
            theta["C"] = Param((columns, 1))
        return theta | {name: Param(sizes[self.de]) for name in "DE" if self.de}

    def weight(self, W: Form, **theta: Any) -> Form:
        if self.ab is None:
            return W
        if self.ab == "lora":
            scale, shift = (LowRank(theta[f"{name}d"], theta[f"{name}u"]) for name in "AB")
            return W + Hadamard(W, scale) + shift
        rows, columns = W.shape[-2:]  # type: ignore[attr-defined]
        scale, shift = theta["A"].expand(rows), theta["B"].expand(rows)
        return Diagonal(1 + scale) @ W + LowRank(shift[:, None], shift.new_ones(1, columns))

    def shifted(self, W: Any, b: Tensor | None, **theta: Any) -> Tensor | None:
        if b is None:
            return None
        new = b if self.de is None else b + b * theta["D"] + theta["E"]
        if self.c is None:
            return new
        C = theta["Cd"] @ theta["Cu"] if self.c == "lora" else theta["C"]
        return new + torch.matmul(W, C.to(W.dtype)).squeeze(-1)
