"""DoRA: direction by a low-rank update, magnitude of every output on its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Diagonal, Form
from rewrite.method import Method, Param, Tensor
from rewrite.methods.lora import Lora
from rewrite.sites import Site


@dataclass(frozen=True)
class Dora(Lora):
    """W  ->  m (W + s B A) / |W + s B A|, row by row, the norm without a gradient  (Liu et al. 2024)"""

    delta = Method.delta  # type: ignore[assignment]  # its view is the rewritten weight
    paper = "https://arxiv.org/abs/2402.09353"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return "a bias on B would be normalised away: leave bias out" if self.bias else None

    def params(self, site: Site) -> dict[str, Param]:
        return super().params(site) | {"m": Param((*site.leading, site.out_features), torch.nn.init.ones_)}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        super().initialise(W, theta)
        theta["m"].copy_(torch.linalg.vector_norm(W + self.update(**theta).materialise(), dim=-1))

    def update(self, m: Tensor, **theta: Tensor) -> Form:
        """The update of the direction."""
        return Lora.delta(self, **theta)

    def weight(self, W: Form, m: Tensor, **theta: Tensor) -> Form:
        V = W + self.update(m, **theta)
        return Diagonal(m / V.row_norms().detach()) @ V
