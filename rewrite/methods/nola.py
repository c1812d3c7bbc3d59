"""NOLA: the factors of a low-rank update as trained combinations of random matrices that a seed brings back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Form, LowRank
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


def uniform(generator: torch.Generator, seed: int | None, basis: Tensor) -> None:
    """Uniform in +-1/sqrt(n) for a basis of n matrices (n, ., .), continuing the generator or from a seed."""
    if seed is not None:
        generator.manual_seed(seed)
    basis.copy_((torch.rand(basis.shape, dtype=torch.float32, generator=generator) * 2 - 1) / basis.shape[0] ** 0.5)


@dataclass(frozen=True)
class Nola(Method):
    """W + s (sum_k b_k B_k) (sum_k a_k A_k), s = alpha / r, the random A_k, B_k shared  (Koohpayegani et al. 2023)"""

    r: int = arg(8, low=1, help="rank")
    n: int = arg(512, low=1, help="number of random matrices for each factor")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    seed: int = arg(0, low=0, help="of the random matrices")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2310.02556"

    def params(self, site: Site) -> dict[str, Param]:
        stream = torch.Generator()
        first, then = functools.partial(uniform, stream, self.seed), functools.partial(uniform, stream, None)
        start = functools.partial(torch.nn.init.normal_, std=1.0)
        return {
            "As": Param((self.n, self.r, site.in_features), first, trainable=False, shared=True),
            "Bs": Param((self.n, site.out_features, self.r), then, trainable=False, shared=True),
            "a": Param((*site.leading, self.n), start),
            "b": Param((*site.leading, self.n)),
        }

    def delta(self, As: Tensor, Bs: Tensor, a: Tensor, b: Tensor) -> Form:
        A, B = torch.einsum("...n,nri->...ri", a, As), torch.einsum("...n,nor->...or", b, Bs)
        return LowRank(B, A) * ((self.alpha or self.r) / self.r)
