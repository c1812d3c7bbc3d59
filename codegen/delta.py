"""Structured updates of a weight: a small algebra that says an update once and derives the rest.

Each form knows `apply(x, layer)` (factored, never forming the update, through any layer map), `materialise()` (the
dense update of the weight's matrix), `add_to(W, layer)` (the updated weight, as stored), `shift()` (the update of the
bias) and `cost` (multiply-adds as a sympy expression, by which a lowering chooses).
Forms add, subtract, scale, and spread over some rows of a larger matrix.  They hold tensors, or anything that behaves
like one (`torch.fx.Proxy`): this module never asks for a tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

import rewrite.codegen.ops  # noqa: F401  (defines torch.ops.rewrite)
from rewrite.codegen.maps import LINEAR, LayerMap, Matmul, Rows
from rewrite.codegen.weights import low_rank_weight

Tensor = torch.Tensor
TOKENS, IN, OUT = sympy.symbols("tokens d_in d_out", positive=True, integer=True)
"""Symbols of every cost: rows of the input, and the two sizes of the weight (d_out, d_in)."""


def _as(tensor: Any, like: Any) -> Any:
    """Cast parameters down to the activation's dtype; activations are never cast up."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


class Delta:
    """An update of the affine map `x -> W x + b`, `W + materialise()` and `b + shift()`, in whatever layer W stands."""

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        """`scale * (dW x + db)` through `layer`: x (..., d_in) -> (..., d_out) for a linear one.

        `like` has the dtype of the result: it is needed where x has none of its own (ids).
        """
        raise NotImplementedError

    def materialise(self) -> Tensor:
        """The dense update of the matrix, (..., d_out, d_in), in the dtype of the parameters."""
        raise NotImplementedError

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        """The weight W, as `layer` stores it, plus `scale` times the update at its `rows`; differentiable.

        What comes back behaves as that tensor; its reader may go by the factors of the update instead of forming it.
        """
        update = self.materialise()
        update = update if scale == 1.0 else update * scale
        return W + _as(layer.stored(update if rows is None else rows.put(update), W.shape), W)

    def spread(self, rows: Rows) -> Delta:
        """The update of a larger matrix that is this one at `rows`, and nothing elsewhere."""
        return Spread(self, rows)

    def shift(self) -> Tensor | None:
        """The update of the bias, (outputs,), or None where there is none."""
        return None

    def cost(self) -> sympy.Expr:
        """Multiply-adds of `apply` in TOKENS, IN and OUT."""
        raise NotImplementedError

    def map(self, change: Callable[[Any], Any]) -> Delta:
        """The same form over changed tensors (cast, detached, moved)."""
        raise NotImplementedError

    def terms(self, scale: float = 1.0) -> tuple[Delta, ...]:
        """The summands of `scale * self`, each of which a fused kernel can add on its own."""
        return (self if scale == 1.0 else Scaled(self, scale),)

    def __add__(self, other: Delta) -> Delta:
        return Sum((self, other))

    def __sub__(self, other: Delta) -> Delta:
        return self + Scaled(other, -1.0)

    def __mul__(self, scale: float) -> Delta:
        return Scaled(self, scale)

    __rmul__ = __mul__


@dataclass(frozen=True)
class LowRank(Delta):
    """`dW = B A` with A of shape (..., r, d_in) and B of shape (..., d_out, r)  (Hu et al. 2021).

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).materialise().shape
    torch.Size([3, 2])
    """

    B: Any
    A: Any

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if isinstance(layer, Matmul) and isinstance(x, torch.Tensor) and x.dtype != self.A.dtype:
            return torch.ops.rewrite.low_rank(x, self.A, self.B, scale)  # eager autograd would save the casts
        # The scale goes on the (..., r) product: it is the smallest tensor on the way.
        h = layer.shrink(x, self.A if layer.reads_ids else _as(self.A, x))
        h = h if like is None else _as(h, like)
        return layer.expand(h if scale == 1.0 else h * scale, _as(self.B, h))

    def materialise(self) -> Tensor:
        return self.B @ self.A

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        if not isinstance(layer, Matmul):
            return super().add_to(W, layer, rows, scale)
        B = self.B if rows is None else rows.put(self.B)
        return low_rank_weight(W, self.A, B, scale, layer.transposed)

    def spread(self, rows: Rows) -> Delta:
        return LowRank(rows.put(self.B), self.A)

    def __add__(self, other: Delta) -> Delta:
        return self._stacked(other.B, other.A) if isinstance(other, LowRank) else super().__add__(other)

    def __sub__(self, other: Delta) -> Delta:
        return self._stacked(-other.B, other.A) if isinstance(other, LowRank) else super().__sub__(other)

    def _stacked(self, B: Any, A: Any) -> LowRank:
        # B A + B' A' = [B, B'] [A; A']: one branch of the summed rank.
        return LowRank(torch.cat([self.B, B], dim=-1), torch.cat([self.A, A], dim=-2))

    def cost(self) -> sympy.Expr:
        return TOKENS * self.A.shape[-2] * (IN + OUT)

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return LowRank(change(self.B), change(self.A))


@dataclass(frozen=True)
class Shift(Delta):
    """`db = c` with c of shape (outputs,): an update of the bias alone."""

    c: Any

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        c = _as(self.c, x if like is None else like)
        return layer.broadcast(c if scale == 1.0 else c * scale)

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        return W

    def spread(self, rows: Rows) -> Delta:
        return Shift(rows.put(self.c, -1))

    def materialise(self) -> Tensor:
        return torch.zeros((), dtype=self.c.dtype, device=self.c.device)

    def shift(self) -> Tensor | None:
        return self.c

    def cost(self) -> sympy.Expr:
        return sympy.Integer(0)

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return Shift(change(self.c))


@dataclass(frozen=True)
class Scaled(Delta):
    """`factor * form`."""

    form: Delta
    factor: float

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        return self.form.apply(x, layer, scale * self.factor, like)

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        return self.form.add_to(W, layer, rows, scale * self.factor)

    def spread(self, rows: Rows) -> Delta:
        return Scaled(self.form.spread(rows), self.factor)

    def terms(self, scale: float = 1.0) -> tuple[Delta, ...]:
        return self.form.terms(scale * self.factor)

    def materialise(self) -> Tensor:
        return self.form.materialise() * self.factor

    def shift(self) -> Tensor | None:
        shift = self.form.shift()
        return None if shift is None else shift * self.factor

    def cost(self) -> sympy.Expr:
        return self.form.cost()

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return Scaled(self.form.map(change), self.factor)


@dataclass(frozen=True)
class Sum(Delta):
    """The sum of several updates of one weight."""

    parts: tuple[Delta, ...]

    def terms(self, scale: float = 1.0) -> tuple[Delta, ...]:
        return tuple(t for part in self.parts for t in part.terms(scale))

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        first, *rest = (part.apply(x, layer, scale, like) for part in self.parts)
        for term in rest:
            first = first + term
        return first

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        for part in self.parts:
            W = part.add_to(W, layer, rows, scale)
        return W

    def spread(self, rows: Rows) -> Delta:
        return Sum(tuple(part.spread(rows) for part in self.parts))

    def materialise(self) -> Tensor:
        first, *rest = (term.materialise() for term in self.parts)
        for term in rest:
            first = first + term
        return first

    def shift(self) -> Tensor | None:
        shifts = [s for term in self.parts if (s := term.shift()) is not None]
        return torch.stack(shifts).sum(0) if shifts else None

    def cost(self) -> sympy.Expr:
        return sympy.Add(*(term.cost() for term in self.parts))

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return Sum(tuple(term.map(change) for term in self.parts))


@dataclass(frozen=True)
class Spread(Delta):
    """`form` at some rows of a larger matrix; forms that can say so in their own tensors do."""

    form: Delta
    rows: Rows

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        return self.rows.put(self.form.apply(x, layer, scale, like), layer.channel)

    def materialise(self) -> Tensor:
        return self.rows.put(self.form.materialise())

    def shift(self) -> Tensor | None:
        shift = self.form.shift()
        return None if shift is None else self.rows.put(shift, -1)

    def cost(self) -> sympy.Expr:
        return self.form.cost()

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return Spread(self.form.map(change), self.rows)
