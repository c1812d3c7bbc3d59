"""Structured matrices: a small algebra that says a matrix once and derives the rest.

A form is an update of a weight, a factor of one, or the weight itself.  Each knows `apply(x, layer)` (its product
with the input of a layer, in whatever layer the weight stands), `materialise()` (the dense matrix), `T` (its
transpose), `add_to(W, layer)` (the updated weight, as stored), `shift()` (an update of the bias) and `cost`
(multiply-adds as a sympy expression, by which a lowering chooses between its factors and the dense matrix).
Forms add, subtract, scale, multiply (`@`), and spread over some rows of a larger matrix.  They hold tensors, or
anything that behaves like one (`torch.fx.Proxy`): this package never asks for a tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import sympy
import torch

from rewrite.codegen.maps import LINEAR, LayerMap, Matmul, Rows

Tensor = torch.Tensor
TOKENS, IN, OUT = sympy.symbols("tokens d_in d_out", positive=True, integer=True)
"""Symbols of every cost: rows of the input, and the two sizes of the matrix (d_out, d_in)."""


def cast(tensor: Any, like: Any) -> Any:
    """Parameters in the activation's dtype; activations are never cast up."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


class Form:
    """A matrix M (..., d_out, d_in) by its structure; forms that are dataclasses of tensors and forms get `map`.

    A form states `materialise` and `formation`.  One whose product is cheaper than the dense one states `factored`
    (and `cost`) too, and `transpose`, where that has the same structure.
    """

    def materialise(self) -> Tensor:
        """The dense matrix, (..., d_out, d_in), in the dtype of the parameters."""
        raise NotImplementedError

    def formation(self) -> sympy.Expr:
        """Multiply-adds of `materialise`, in IN and OUT."""
        return sympy.Integer(0)

    def factored(self, x: Any) -> Any:
        """M x for x (..., d_in) -> (..., d_out) without forming M; raises `NotImplementedError` where it must."""
        raise NotImplementedError

    def cost(self) -> sympy.Expr:
        """Multiply-adds of `apply` on a linear layer, in TOKENS, IN and OUT."""
        return self.formation() + TOKENS * IN * OUT

    def transpose(self) -> Form:
        """The transposed matrix."""
        return Transposed(self)

    @property
    def T(self) -> Form:
        return self.transpose()

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        """`scale * (M x + shift)` through `layer`: x (..., d_in) -> (..., d_out) for a linear one.

        `like` has the dtype of the result: it is needed where x has none of its own (ids).
        """
        if Form.has_factors(self, layer):
            y = self.map(lambda t: cast(t, x)).factored(x)
            return y if scale == 1.0 else y * scale
        M = cast(self.materialise(), x if like is None else like)
        return layer.product(x, M if scale == 1.0 else M * scale)

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        """The weight W, as `layer` stores it, plus `scale` times this matrix at its `rows`; differentiable.

        What comes back behaves as that tensor; its reader may go by the factors of the update instead of forming it.
        """
        update = self.materialise()
        update = update if scale == 1.0 else update * scale
        return W + cast(layer.stored(update if rows is None else rows.put(update), W.shape), W)

    def has_factors(self, layer: LayerMap) -> bool:
        """Whether `apply` through such a layer never forms the dense matrix."""
        return isinstance(layer, Matmul) and type(self).factored is not Form.factored

    def is_light(self) -> bool:
        """Whether its factors are so much smaller than the matrix that it is never worth forming."""
        return False

    def gated(self, gate: Any) -> Form:
        """The form times a tensor: (1,), or a number for every row of a batch, aligned with the layer's output."""
        return _algebra().Gated(self, gate)

    def spread(self, rows: Rows) -> Form:
        """The larger matrix that is this one at `rows`, and zero elsewhere."""
        return _algebra().Spread(self, rows)

    def shift(self) -> Tensor | None:
        """The update of the bias, (outputs,), or None where there is none."""
        return None

    def squares(self) -> Any:
        """The sum of squares of every row, (..., d_out)."""
        return self.materialise().square().sum(-1)

    def gram(self, other: Form) -> Any:
        """The inner product of every row with the same row of another matrix, (..., d_out)."""
        return (self.materialise() * other.materialise()).sum(-1)

    def row_norms(self) -> Any:
        """The Euclidean norm of every row, (..., d_out)."""
        return self.squares().sqrt()

    def less(self, base: Form) -> Form:
        """This matrix less `base`, of which it was made: what rewriting a weight adds to it."""
        return self - base

    def by_rows(self, d: Any) -> Form:
        """`diag(d) M`, d (..., d_out)."""
        return Diagonal(d) @ self

    def map(self, change: Callable[[Any], Any]) -> Form:
        """The same form over changed tensors (cast, detached, moved)."""
        return type(self)(*(_changed(getattr(self, f.name), change) for f in fields(self)))  # type: ignore[arg-type]

    def terms(self, scale: float = 1.0) -> tuple[Form, ...]:
        """The summands of `scale * self`, each of which a fused kernel can add on its own."""
        return (self * scale,)

    def __add__(self, other: Form) -> Form:
        return _algebra().Sum((self, other))

    def __sub__(self, other: Form) -> Form:
        return self + _algebra().Scaled(other, -1.0)

    def __mul__(self, scale: float) -> Form:
        return self if scale == 1.0 else _algebra().Scaled(self, scale)

    __rmul__ = __mul__

    def __matmul__(self, other: Form) -> Form:
        return _algebra().Product(self, other)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Form):
        return value.map(change)
    if isinstance(value, tuple):
        return tuple(_changed(v, change) for v in value)
    return change(value) if hasattr(value, "dtype") and value.dtype.is_floating_point else value


def _algebra() -> Any:
    """Combinations of forms, which are forms: they stand in a file of their own."""
    from rewrite.codegen.forms import algebra

    return algebra


@dataclass(frozen=True)
class Dense(Form):
    """A matrix as it is: M (..., d_out, d_in)."""

    M: Any

    def materialise(self) -> Tensor:
        return self.M

    def transpose(self) -> Form:
        return Dense(self.M.transpose(-2, -1))


@dataclass(frozen=True)
class Formed(Form):
    """`form` as its dense matrix, where that is cheaper than its factors."""

    form: Form

    def materialise(self) -> Tensor:
        return self.form.materialise()

    def formation(self) -> sympy.Expr:
        return self.form.formation()

    def spread(self, rows: Rows) -> Form:
        return Formed(self.form.spread(rows))


@dataclass(frozen=True)
class Diagonal(Form):
    """The square matrix diag(d), d (n,)."""

    d: Any

    def materialise(self) -> Tensor:
        return torch.diag_embed(self.d)

    def is_light(self) -> bool:
        return True

    def factored(self, x: Any) -> Any:
        return x * self.d

    def cost(self) -> sympy.Expr:
        return TOKENS * IN

    def transpose(self) -> Form:
        return self


@dataclass(frozen=True)
class Shift(Form):
    """`db = c` with c of shape (outputs,): an update of the bias alone."""

    c: Any

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        c = cast(self.c, x if like is None else like)
        return layer.broadcast(c if scale == 1.0 else c * scale)

    def is_light(self) -> bool:
        return True

    def has_factors(self, layer: LayerMap) -> bool:
        return True

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        return W

    def spread(self, rows: Rows) -> Form:
        return Shift(rows.put(self.c, -1))

    def materialise(self) -> Tensor:
        return torch.zeros((), dtype=self.c.dtype, device=self.c.device)

    def shift(self) -> Tensor | None:
        return self.c

    def cost(self) -> sympy.Expr:
        return sympy.Integer(0)

    def transpose(self) -> Form:
        raise TypeError("a shift of the bias has no transpose")


@dataclass(frozen=True)
class Transposed(Form):
    """`form'`, for forms whose transpose has no structure of its own."""

    form: Form

    def materialise(self) -> Tensor:
        return self.form.materialise().transpose(-2, -1)

    def formation(self) -> sympy.Expr:
        return swapped(self.form.formation())

    def transpose(self) -> Form:
        return self.form


def swapped(cost: sympy.Expr) -> sympy.Expr:
    """The cost of a transposed matrix."""
    return cost.subs({IN: OUT, OUT: IN}, simultaneous=True)  # type: ignore[return-value]
