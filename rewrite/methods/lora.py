"""LoRA: a low-rank update beside a frozen weight.  Dropout never merges: it is off then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rewrite.codegen.forms import Form, LowRank, Shift
from rewrite.inits import INITS, KAIMING, Init
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site

if TYPE_CHECKING:
    from rewrite.runtime.calibration import Seen


@dataclass(frozen=True)
class Lora(Method):
    """y + s (B A x + c), s = alpha / r  (Hu et al. 2021); s = alpha / sqrt(r) with scale=rs (Kalajdzievski 2023)."""

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    scale: Literal["linear", "rs"] = arg("linear", help="s = alpha / r, or alpha / sqrt(r) for rs")
    bias: bool = arg(False, help="train a bias c on B")
    init: Init = arg(KAIMING, choices=INITS, help="how A and B start")
    plus: float = arg(1.0, above=0, help="how much faster B learns than A (LoRA+, Hayou et al. 2024)")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2106.09685"

    @property
    def s(self) -> float:
        """The scale of the branch."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.scale == "rs" else self.r)

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init.identity

    @property
    def needs_storage(self) -> bool:  # type: ignore[override]
        return self.init.needs_storage

    @property
    def calibration(self) -> Literal["inputs", "gradients"] | None:  # type: ignore[override]
        return self.init.calibration

    def params(self, site: Site) -> dict[str, Param]:
        shapes = {"A": (*site.leading, self.r, site.in_features), "B": (*site.leading, site.out_features, self.r)}
        theta = {"A": Param(shapes["A"], kaiming), "B": Param(shapes["B"], lr=self.plus)}
        if site.kind == "embedding" and self.init == KAIMING:  # as HF PEFT starts there
            theta = {"A": Param(shapes["A"]), "B": Param(shapes["B"], torch.nn.init.normal_, lr=self.plus)}
        if self.init.residual:
            theta |= {"A0": Param(shapes["A"], trainable=False), "B0": Param(shapes["B"], trainable=False)}
        if self.bias:
            theta["c"] = Param((site.outputs,))
        return theta

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        self.init.fill(W, theta["A"], theta["B"], self.s)
        self.keep_start(theta)

    def calibrated(self, W: Tensor, theta: dict[str, Tensor], seen: Seen) -> None:
        self.init.calibrated(W, theta["A"], theta["B"], self.s, seen)
        self.keep_start(theta)

    def keep_start(self, theta: dict[str, Tensor]) -> None:
        """Remember where A and B start, so that the start changes nothing."""
        if self.init.residual:
            theta["A0"].copy_(theta["A"])
            theta["B0"].copy_(theta["B"])

    def fits(self, site: Site) -> str | None:
        if self.init.calibration and site.kind != "linear":
            return f"init={type(self.init).__name__.lower()} looks at the inputs of linear layers"
        return self.init.refuses(self.r, min(site.in_features, site.out_features))

    def delta(
        self, A: Tensor, B: Tensor, A0: Tensor | None = None, B0: Tensor | None = None, c: Tensor | None = None
    ) -> Form:
        update: Form = LowRank(B, A)
        if A0 is not None:
            update = update - LowRank(B0, A0)
        return (update if c is None else update + Shift(c)) * self.s
