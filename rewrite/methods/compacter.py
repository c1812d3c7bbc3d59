"""Compacter: a bottleneck adapter whose weights are sums of Kronecker products with rules that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rewrite.method import Method, Param, Tensor, arg
from rewrite.methods.adapter import ACTIVATIONS, Activation
from rewrite.sites import Site


@dataclass(frozen=True)
class Compacter(Method):
    """y + U act(D y + b) + c, where D and U are sum_i kron(R_i, s_i t_i^T)  (Mahabadi et al. 2021)

    The rules R are one tensor for the whole clause.  `compacter` alone is Compacter, `compacter@ffn.down` is
    Compacter++.  Sizes that n does not divide are padded with zeros.  t of U starts at zero, so that step 0 is the
    identity, which the paper only comes near to.
    """

    r: int = arg(24, low=1, help="width of the bottleneck")
    n: int = arg(4, low=1, help="terms of the sum, and the size of the rules")
    act: Activation = arg("gelu_tanh", help="the non-linearity in the bottleneck")

    kinds = frozenset({"linear", "norm", "embedding", "conv"})
    default_sites = "attn.o,ffn.down"
    paper = "https://arxiv.org/abs/2106.04647"

    def params(self, site: Site) -> dict[str, Param]:
        wide, narrow = (self.n, -(-site.outputs // self.n)), (self.n, -(-self.r // self.n))
        return {
            "rule": Param((self.n, self.n, self.n), partial(torch.nn.init.normal_, std=0.01), shared=True),
            "down_s": Param(wide, _glorot),
            "down_t": Param(narrow, _glorot),
            "down_bias": Param((self.r,)),
            "up_s": Param(narrow, _glorot),
            "up_t": Param(wide),
            "up_bias": Param((site.outputs,)),
        }

    def output(
        self,
        x: Tensor,
        y: Tensor,
        rule: Tensor,
        down_s: Tensor,
        down_t: Tensor,
        down_bias: Tensor,
        up_s: Tensor,
        up_t: Tensor,
        up_bias: Tensor,
    ) -> Tensor:
        h = ACTIVATIONS[self.act](_product(y, rule, down_s, down_t)[..., : self.r] + down_bias)
        return y + _product(h, rule, up_s, up_t)[..., : y.shape[-1]] + up_bias


def _product(x: Tensor, rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x sum_i kron(R_i, s_i t_i^T) without the matrix: (..., n p) -> (..., n q)."""
    n, p = s.shape
    x = F.pad(x, (0, n * p - x.shape[-1])).unflatten(-1, (n, p))
    return torch.einsum("...jp,ip,ijl,iq->...lq", x, s, rule, t).flatten(-2)


def _glorot(tensor: Tensor) -> Tensor:
    """Uniform; each s_i (p, 1) and t_i (1, q) by itself has the fans p and 1 (Glorot and Bengio 2010, gain sqrt 2)."""
    bound = (12 / (tensor.shape[-1] + 1)) ** 0.5
    return torch.nn.init.uniform_(tensor, -bound, bound)
