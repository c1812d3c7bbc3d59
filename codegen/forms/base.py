"""The weight of a layer as a form: what a method that rewrites W states its formula over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_map_only

import rewrite.codegen.row_norms  # noqa: F401  (defines rewrite::adapted_row_norms)
from rewrite.codegen.forms.algebra import Scaled, Sum
from rewrite.codegen.forms.form import Form, cast
from rewrite.codegen.forms.low_rank import LowRank
from rewrite.codegen.maps import LINEAR, LayerMap
from rewrite.codegen.tensors import wide_dtype


@dataclass(frozen=True)
class Base(Form):
    """The matrix W (..., d_out, d_in) of a layer; `y` is what the layer makes of `x` without a bias, where known.

    Anything that a tensor can do, it does as its dense matrix: `W.softmax(-1)`, `torch.linalg.svd(W)`.
    """

    W: Any
    x: Any = None
    y: Any = None

    def materialise(self) -> Any:
        return self.W

    def is_light(self) -> bool:
        return True

    def has_factors(self, layer: LayerMap) -> bool:
        return True

    def cost(self) -> sympy.Expr:
        return sympy.Integer(0)  # the layer computes it anyhow

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        y = self.y if x is self.x and self.y is not None else layer.product(x, self.W)
        return y if scale == 1.0 else y * scale

    def __add__(self, other: Form) -> Form:
        low_rank, scale = (other.form, other.factor) if isinstance(other, Scaled) else (other, 1.0)
        if isinstance(low_rank, LowRank) and self.W.ndim == 2:
            return Adapted((self, other), low_rank, scale)
        return super().__add__(other)

    def squares(self) -> Any:
        norms = torch.linalg.vector_norm(self.W, dim=-1, dtype=wide_dtype(self.W.dtype))
        return norms * norms

    def gram(self, other: Form) -> Any:
        if isinstance(other, LowRank):  # W A' costs r tokens, the dense update d_in of them
            return ((self.W @ cast(other.A, self.W).transpose(-2, -1)) * other.left).sum(-1)
        return other.gram(self) if isinstance(other, Scaled | Sum) else super().gram(other)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "W" not in self.__dict__:  # copying and pickling ask before there is one
            raise AttributeError(name)
        return getattr(self.W, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda base: base.W, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Adapted(Sum):
    """`W + scale * low_rank`: its row norms are one operator, since a kernel reads W once for all of them."""

    low_rank: LowRank
    scale: float

    def row_norms(self) -> Any:
        base, update = self.parts[0], self.low_rank
        assert isinstance(base, Base)
        return torch.ops.rewrite.adapted_row_norms([base.W], "dense", update.A, update.left, self.scale)
