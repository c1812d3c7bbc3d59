"""RandLoRA: updates of full rank as sums of frozen random products, which two trained matrices weigh."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.init import constant_, kaiming_uniform_

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


class Basis:
    """Draws A (r, 1, narrow), and then B (wide, n, r) from where that ended; every entry has deviation 1 at the end.

    HF PEFT draws with narrow = min(D_out, D_in), wide = max(D_out, D_in), D the largest sizes of all layers, and n as
    many parts of rank r as fill narrow; a layer uses the leading part.  Where the layer with D_out is not that with
    D_in, narrow is less here, and numbers that were drawn there have to be loaded.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed, self.stream, self.narrow = kind, seed, torch.Generator(), 1

    def first(self, A: Tensor) -> None:
        self.stream.manual_seed(self.seed)
        self.narrow = A.shape[-1]
        self.then(A)

    def then(self, tensor: Tensor) -> None:
        if self.kind == "dense":  # part by part, and in bfloat16: another dtype draws other numbers
            one = (tensor.shape[0], 1, tensor.shape[2])
            parts = [torch.empty(one, dtype=torch.bfloat16) for _ in range(tensor.shape[1])]
            made = torch.cat([kaiming_uniform_(part, math.sqrt(5), generator=self.stream) for part in parts], dim=1)
        else:
            edge = 1 / (2 * (3.0 if self.kind == "sparse" else math.sqrt(self.narrow)))
            uniform = torch.rand(tensor.shape, dtype=torch.float32, generator=self.stream)
            made = (uniform > 1 - edge).float() - (uniform < edge).float()
        tensor.copy_(made / made.std())


@dataclass(frozen=True)
class Randlora(Method):
    """W + s sum_j B_j diag(lambda_j) A diag(gamma_j), s = alpha / r, A on the narrower side  (Albert et al. 2025)"""

    r: int = arg(32, low=1, help="rank of each product")
    alpha: float | None = arg(
        None, above=0, help="numerator of the scale, 20 r in the paper; none is r: the scale is 1"
    )
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    basis: Literal["dense", "sparse", "very_sparse"] = arg("dense", help="what A and B are drawn from")
    seed: int = arg(0, low=0, help="of A and B: HF PEFT draws the same for the same largest sizes")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2502.00987"

    def params(self, site: Site) -> dict[str, Param]:
        narrow, wide = sorted((site.in_features, site.out_features))
        count, drawing = math.ceil(narrow / self.r), Basis(self.basis, self.seed)
        gamma = "gamma_in" if narrow == site.in_features else "gamma_out"
        start = functools.partial(constant_, val=1 / max(count, narrow))
        return {
            "A": Param((self.r, 1, narrow), drawing.first, trainable=False, shared=True),
            "B": Param((wide, count, self.r), drawing.then, trainable=False, shared=True),
            "lam": Param((*site.leading, self.r, count)),
            gamma: Param((*site.leading, count, narrow), start),
        }

    def delta(self, A: Tensor, B: Tensor, lam: Tensor, **gammas: Tensor) -> Form:
        (side, gamma), *_ = gammas.items()
        # As HF PEFT has it: A counts rank by part where B counts part by rank.
        inner = (lam[..., None] * A * gamma.unsqueeze(-3)).flatten(-3, -2)
        outer = B.flatten(1).expand(*lam.shape[:-2], B.shape[0], inner.shape[-2])
        narrow = LowRank(outer, inner)
        return (narrow if side == "gamma_in" else narrow.T) * ((self.alpha or self.r) / self.r)
