"""VeRA: one frozen random pair of projections for all layers, and two trained vectors for each."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


def drawn(generator: torch.Generator, seed: int | None, tensor: Tensor) -> None:
    """Uniform in +-sqrt(6 / d_in), continuing the generator or from a seed; drawn on the CPU in float32."""
    if seed is not None:
        generator.manual_seed(seed)
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(tensor.shape[-1]))
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


@dataclass(frozen=True)
class Vera(Method):
    """y + b * (B (d * (A x))), A and B frozen, random and shared  (Kopiczko et al. 2023)"""

    r: int = arg(256, low=1, help="rank")
    d0: float = arg(0.1, help="where d starts")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    seed: int = arg(0, low=0, help="of A and B: HF PEFT draws the same for layers of the same largest sizes")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2310.11454"

    def params(self, site: Site) -> dict[str, Param]:
        stream = torch.Generator()  # B goes on where A ends
        A, B = functools.partial(drawn, stream, self.seed), functools.partial(drawn, stream, None)
        return {
            "A": Param((self.r, site.in_features), A, trainable=False, shared=True),
            "B": Param((site.out_features, self.r), B, trainable=False, shared=True),
            "d": Param((*site.leading, self.r), functools.partial(torch.nn.init.constant_, val=self.d0)),
            "b": Param((*site.leading, site.out_features)),
        }

    def delta(self, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Form:
        # Both vectors on B: no product with the tokens is kept but A x.
        return LowRank(b[..., :, None] * B * d[..., None, :], A.expand(*d.shape[:-1], *A.shape))
