"""LoRA: a low-rank update beside a frozen weight, with its initialisations.  Dropout never merges: it is off then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rewrite.codegen.forms import Form, LowRank, Shift
from rewrite.method import Method, Param, Tensor, arg, kaiming
from rewrite.sites import Site


@dataclass(frozen=True)
class Init:
    """How A and B start.  `residual`: they start at a part of W, which the frozen A0, B0 take off again."""

    residual: ClassVar[bool] = False

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        """Fill A (..., r, d_in) and B (..., d_out, r) in place; W (..., d_out, d_in) is in the dtype of A."""


@dataclass(frozen=True)
class Kaiming(Init):
    """A uniform in +-1/sqrt(d_in), B = 0  (the reference code of Hu et al. 2021); of an embedding A = 0, B normal."""


@dataclass(frozen=True)
class Gaussian(Init):
    """A normal with deviation 1/r, B = 0."""

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        A.normal_(std=1 / A.shape[-2])


@dataclass(frozen=True)
class Pissa(Init):
    """Principal singular vectors: B A = (the r largest singular triples of W) / scale  (Meng et al. 2024)."""

    niter: int | None = arg(None, low=1, help="subspace iterations of a randomised SVD; none is the exact SVD")
    residual = True

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        r = A.shape[-2]
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, q=r, niter=self.niter)
            Vh = V.mT
        root = (S[..., :r] / scale).sqrt()
        A.copy_(root[..., :, None] * Vh[..., :r, :])
        B.copy_(U[..., :r] * root[..., None, :])


@dataclass(frozen=True)
class Olora(Init):
    """The leading part of W = Q R: B = Q[:, :r], A = R[:r]  (Buyukakyuz 2024)."""

    residual = True

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        Q, R = torch.linalg.qr(W)
        A.copy_(R[..., : A.shape[-2], :])
        B.copy_(Q[..., : A.shape[-2]])


_KAIMING = Kaiming()
INITS = {"kaiming": Kaiming, "gaussian": Gaussian, "pissa": Pissa, "olora": Olora}


@dataclass(frozen=True)
class Lora(Method):
    """y + s (B A x + c), s = alpha / r  (Hu et al. 2021); s = alpha / sqrt(r) with scale=rs (Kalajdzievski 2023)."""

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale; none is r, so that the scale is 1")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")
    scale: Literal["linear", "rs"] = arg("linear", help="s = alpha / r, or alpha / sqrt(r) for rs")
    bias: bool = arg(False, help="train a bias c on B")
    init: Init = arg(_KAIMING, choices=INITS, help="how A and B start")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2106.09685"

    @property
    def s(self) -> float:
        """The scale of the branch."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.scale == "rs" else self.r)

    def params(self, site: Site) -> dict[str, Param]:
        shapes = {"A": (*site.leading, self.r, site.in_features), "B": (*site.leading, site.out_features, self.r)}
        theta = {"A": Param(shapes["A"], kaiming), "B": Param(shapes["B"])}
        if site.kind == "embedding" and self.init == _KAIMING:  # as HF PEFT starts there
            theta = {"A": Param(shapes["A"]), "B": Param(shapes["B"], torch.nn.init.normal_)}
        if self.init.residual:
            theta |= {"A0": Param(shapes["A"], trainable=False), "B0": Param(shapes["B"], trainable=False)}
        if self.bias:
            theta["c"] = Param((site.outputs,))
        return theta

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        self.init.fill(W, theta["A"], theta["B"], self.s)
        if self.init.residual:
            theta["A0"].copy_(theta["A"])
            theta["B0"].copy_(theta["B"])

    def fits(self, site: Site) -> str | None:
        limit = min(site.in_features, site.out_features)
        if self.init.residual and self.r > limit:
            init = type(self.init).__name__.lower()
            return f"r={self.r} is more than the rank {limit} of its weight, which init={init} needs"
        return None

    def delta(  # pyright: ignore[reportIncompatibleMethodOverride]  # each method names its own tensors
        self,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None = None,
        B0: Tensor | None = None,
        c: Tensor | None = None,
    ) -> Form:
        update: Form = LowRank(B, A)
        if A0 is not None:
            update = update - LowRank(B0, A0)
        return (update if c is None else update + Shift(c)) * self.s
