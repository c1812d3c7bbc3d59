"""Saved activations in fewer bits: the forward is exact, the backward reads a rounded copy, or a rounded derivative."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.codecs import CODECS
from rewrite.method import Method, arg
from rewrite.passes.keep import Coarse, Encoded, Rule

BITS = {"int4": 4, "bit1": 1}
"""Codecs of derivatives: of nonlinearities alone."""


@dataclass(frozen=True)
class Save(Method):
    """save(x)  ->  save(encode(x)), backward on decode(encode(x))  (Pan et al. 2021)

    fp8 and int8 store values, and the backward is that of the forward at the decoded ones.  int4 and bit1 store the
    derivative of nonlinearities, which changes the formula of their backward: such clauses are marked `~`, but for bit1
    where the derivative has two values (ReLU).
    """

    codec: str = arg("fp8", choices=(*CODECS, *BITS), positional=True, help="how values are stored")
    group: int = arg(128, low=8, help="values of the last dimension that share a scale, for fp8 and int8")

    policy = True
    anywhere = True
    kinds = frozenset({"linear", "norm", "conv", "expert", "embedding", "block", "other"})
    paper = "https://arxiv.org/abs/2111.11124"

    @property
    def rounds(self) -> bool:
        return self.codec in CODECS

    def check(self) -> str | None:
        return "derivatives have no groups" if self.codec in BITS and self.group != 128 else None

    def approximation(self, marked: bool) -> str | None:
        if self.codec == "int4":
            return "nonlinearities keep their derivative in 16 levels"
        if self.codec == "bit1" and marked:
            return "nonlinearities that resemble a ReLU have the derivative of one"
        return None

    def keeps(self, marked: bool) -> Rule:
        if self.codec in BITS:
            return Coarse(bits=BITS[self.codec], approximate=marked)
        return Encoded(codec=CODECS[self.codec](self.group))
