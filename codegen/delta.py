"""Structured updates of a weight: a small algebra that says an update once and derives the rest.

Each form knows `apply(x)` (factored, never forming the update), `materialise()` (the dense update, for merge),
`shift()` (the update of the bias) and `cost` (multiply-adds as a sympy expression, by which a lowering chooses).
Forms add, subtract and scale.  They hold tensors, or anything that behaves like one (`torch.fx.Proxy`):
this module never asks for a tensor's values or sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

import rewrite.codegen.ops  # noqa: F401  (defines torch.ops.rewrite)

Tensor = torch.Tensor
TOKENS, IN, OUT = sympy.symbols("tokens d_in d_out", positive=True, integer=True)
"""Symbols of every cost: rows of the input, and the two sizes of the weight (d_out, d_in)."""


def _as(tensor: Any, like: Any) -> Any:
    """Cast parameters down to the activation's dtype; activations are never cast up."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


class Delta:
    """An update of the affine map `x -> W x + b`: `W + materialise()`, `b + shift()`."""

    def apply(self, x: Any, scale: float = 1.0) -> Any:
        """`scale * (dW x + db)` for x of shape (..., d_in); the result has shape (..., d_out)."""
        raise NotImplementedError

    def materialise(self) -> Tensor:
        """The dense update of the weight, (d_out, d_in), in the dtype of the parameters."""
        raise NotImplementedError

    def shift(self) -> Tensor | None:
        """The update of the bias, (d_out,), or None where there is none."""
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
    """`dW = B A` with A of shape (r, d_in) and B of shape (d_out, r)  (Hu et al. 2021).

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).materialise().shape
    torch.Size([3, 2])
    """

    B: Any
    A: Any

    def apply(self, x: Any, scale: float = 1.0) -> Any:
        if isinstance(x, torch.Tensor) and x.dtype != self.A.dtype:
            return torch.ops.rewrite.low_rank(x, self.A, self.B, scale)  # eager autograd would save the casts
        # The scale goes on the (..., r) product: it is the smallest tensor on the way.
        h = F.linear(x, _as(self.A, x))
        return F.linear(h if scale == 1.0 else h * scale, _as(self.B, x))

    def materialise(self) -> Tensor:
        return self.B @ self.A

    def __add__(self, other: Delta) -> Delta:
        return self._stacked(other.B, other.A) if isinstance(other, LowRank) else super().__add__(other)

    def __sub__(self, other: Delta) -> Delta:
        return self._stacked(-other.B, other.A) if isinstance(other, LowRank) else super().__sub__(other)

    def _stacked(self, B: Any, A: Any) -> LowRank:
        # B A + B' A' = [B, B'] [A; A']: one branch of the summed rank.
        return LowRank(torch.cat([self.B, B], dim=1), torch.cat([self.A, A], dim=0))

    def cost(self) -> sympy.Expr:
        return TOKENS * self.A.shape[0] * (IN + OUT)

    def map(self, change: Callable[[Any], Any]) -> Delta:
        return LowRank(change(self.B), change(self.A))


@dataclass(frozen=True)
class Shift(Delta):
    """`db = c` with c of shape (d_out,): an update of the bias alone."""

    c: Any

    def apply(self, x: Any, scale: float = 1.0) -> Any:
        c = _as(self.c, x)
        return c if scale == 1.0 else c * scale

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

    def apply(self, x: Any, scale: float = 1.0) -> Any:
        return self.form.apply(x, scale * self.factor)

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

    def apply(self, x: Any, scale: float = 1.0) -> Any:
        first, *rest = (part.apply(x, scale) for part in self.parts)
        for term in rest:
            first = first + term
        return first

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
