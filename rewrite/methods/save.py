"""Saved activations in fewer bits: the forward is exact, the backward reads a rounded copy."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.codecs import CODECS
from rewrite.method import Method, arg
from rewrite.passes.keep import Encoded, Rule


@dataclass(frozen=True)
class Save(Method):
    """save(x)  ->  save(encode(x)), backward on decode(encode(x))  (Pan et al. 2021)"""

    codec: str = arg("fp8", choices=tuple(CODECS), positional=True, help="how values are stored")
    group: int = arg(128, low=8, help="values of the last dimension that share a scale")

    policy = True
    anywhere = True
    rounds = True
    kinds = frozenset({"linear", "norm", "conv", "expert", "embedding", "block", "other"})
    paper = "https://arxiv.org/abs/2111.11124"

    def keeps(self, marked: bool) -> Rule:
        return Encoded(codec=CODECS[self.codec](self.group))
