"""VB-LoRA: low-rank factors out of one bank of vectors for all layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch.nn.init import normal_, uniform_

from rewrite.codegen.forms import Codebook, Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Vblora(Method):
    """W + B A, made of vectors that are mixtures of the top k in a shared bank, by softmax  (Li et al. 2024)"""

    r: int = arg(4, low=1, help="rank")
    vectors: int = arg(256, low=2, help="number of vectors in the bank")
    length: int = arg(256, low=1, help="their length; the last one of a row is cut where it does not divide it")
    k: int = arg(2, low=2, help="number of vectors in a mixture: of one alone, no logit would have a gradient")
    bound: float = arg(0.02, above=0, help="the bank starts uniform in +-bound")
    std: float = arg(0.1, above=0, help="deviation of the logits at the start")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    identity = False  # it starts at small random factors
    paper = "https://arxiv.org/abs/2405.15179"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return f"k={self.k} is more than the {self.vectors} vectors of the bank" if self.k > self.vectors else None

    def params(self, site: Site) -> dict[str, Param]:
        rows, columns = (-(-size // self.length) for size in (site.out_features, site.in_features))
        bank = functools.partial(uniform_, a=-self.bound, b=self.bound)
        start = functools.partial(normal_, std=self.std)
        return {
            "logits_A": Param((*site.leading, self.r, columns, self.vectors), start),
            "logits_B": Param((*site.leading, rows, self.r, self.vectors), start),
            "bank": Param((self.vectors, self.length), bank, shared=True),
        }

    def delta(self, logits_A: Tensor, logits_B: Tensor, bank: Tensor, shape: tuple[int, int]) -> Form:
        B = Codebook(logits_B.transpose(-3, -2), bank, self.k, shape[0]).T
        return LowRank(B.materialise(), Codebook(logits_A, bank, self.k, shape[1]).materialise())
