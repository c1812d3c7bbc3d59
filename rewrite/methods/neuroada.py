"""NeuroAda: the k largest weights of every neuron get a trained update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, RowSparse
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Neuroada(Method):
    """y_i + sum_q v_iq x_at(i, q), `at` where row i of W is largest  (Zhang et al. 2025)"""

    k: int = arg(1, low=1, help="weights of every neuron; all, where it has fewer")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2510.18940"

    def params(self, site: Site) -> dict[str, Param]:
        shape = (*site.leading, site.out_features, min(self.k, site.in_features))
        return {"v": Param(shape), "at": Param(shape, trainable=False, dtype=torch.int32)}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        # A stable order, so that ties go to the first everywhere.
        order = W.abs().sort(dim=-1, descending=True, stable=True).indices
        theta["at"].copy_(order[..., : theta["at"].shape[-1]])

    def delta(self, v: Tensor, at: Tensor, shape: tuple[int, int]) -> Form:
        return RowSparse(v, at, shape[1])
