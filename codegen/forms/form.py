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
        return Gated(self, gate)

    def spread(self, rows: Rows) -> Form:
        """The larger matrix that is this one at `rows`, and zero elsewhere."""
        return Spread(self, rows)

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

    def map(self, change: Callable[[Any], Any]) -> Form:
        """The same form over changed tensors (cast, detached, moved)."""
        return type(self)(*(_changed(getattr(self, f.name), change) for f in fields(self)))  # type: ignore[arg-type]

    def terms(self, scale: float = 1.0) -> tuple[Form, ...]:
        """The summands of `scale * self`, each of which a fused kernel can add on its own."""
        return (self if scale == 1.0 else Scaled(self, scale),)

    def __add__(self, other: Form) -> Form:
        return Sum((self, other))

    def __sub__(self, other: Form) -> Form:
        return self + Scaled(other, -1.0)

    def __mul__(self, scale: float) -> Form:
        return self if scale == 1.0 else Scaled(self, scale)

    __rmul__ = __mul__

    def __matmul__(self, other: Form) -> Form:
        return Product(self, other)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Form):
        return value.map(change)
    if isinstance(value, tuple):
        return tuple(_changed(v, change) for v in value)
    return change(value) if hasattr(value, "dtype") and value.dtype.is_floating_point else value


@dataclass(frozen=True)
class Dense(Form):
    """A matrix as it is: M (..., d_out, d_in)."""

    M: Any

    def materialise(self) -> Tensor:
        return self.M

    def transpose(self) -> Form:
        return Dense(self.M.transpose(-2, -1))


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
class Gated(Form):
    """`form` times a gate, as `Form.gated` has it."""

    form: Form
    gate: Any

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        y = self.form.apply(x, layer, scale, like)
        return y * cast(self.gate, y)

    def materialise(self) -> Tensor:
        M = self.form.materialise()
        return M * cast(self.gate, M)

    def is_light(self) -> bool:
        return self.form.is_light()

    def has_factors(self, layer: LayerMap) -> bool:
        return self.form.has_factors(layer)

    def formation(self) -> sympy.Expr:
        return self.form.formation()

    def cost(self) -> sympy.Expr:
        return self.form.cost()

    def spread(self, rows: Rows) -> Form:
        return Gated(self.form.spread(rows), self.gate)

    def shift(self) -> Tensor | None:
        shift = self.form.shift()
        return None if shift is None else shift * cast(self.gate, shift)


def swapped(cost: sympy.Expr) -> sympy.Expr:
    """The cost of a transposed matrix."""
    return cost.subs({IN: OUT, OUT: IN}, simultaneous=True)  # type: ignore[return-value]


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
class Product(Form):
    """`left right`: what `right` makes of x, `left` takes.

    >>> Product(Diagonal(torch.tensor([2.0])), Dense(torch.ones(1, 3))).materialise()
    tensor([[2., 2., 2.]])
    """

    left: Form
    right: Form

    def materialise(self) -> Tensor:
        left, right = self.left, self.right
        if isinstance(left, Diagonal):
            return left.d[..., :, None] * right.materialise()
        if isinstance(right, Diagonal):
            return left.materialise() * right.d
        # The rows of `left right` are right' on the rows of left: a structured right forms nothing.
        if _structured(right.T):
            return right.T.apply(left.materialise())
        if _structured(left):
            return left.apply(right.materialise().transpose(-2, -1)).transpose(-2, -1)
        return left.materialise() @ right.materialise()

    def formation(self) -> sympy.Expr:
        return self.left.formation() + self.right.formation() + IN * OUT

    def is_light(self) -> bool:
        return self.left.is_light() and self.right.is_light()

    def has_factors(self, layer: LayerMap) -> bool:
        return isinstance(layer, Matmul) and self.left.has_factors(layer) and self.right.has_factors(layer)

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if self.has_factors(layer):
            return self.left.apply(self.right.apply(x, LINEAR), LINEAR, scale)
        return super().apply(x, layer, scale, like)

    def cost(self) -> sympy.Expr:
        return self.left.cost() + self.right.cost()

    def transpose(self) -> Form:
        return Product(self.right.T, self.left.T)

    def squares(self) -> Any:
        if isinstance(self.left, Diagonal):
            return self.left.d.square() * self.right.squares()
        return super().squares()


def _structured(form: Form) -> bool:
    return type(form).factored is not Form.factored


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
class Scaled(Form):
    """`factor * form`."""

    form: Form
    factor: float

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        return self.form.apply(x, layer, scale * self.factor, like)

    def is_light(self) -> bool:
        return self.form.is_light()

    def has_factors(self, layer: LayerMap) -> bool:
        return self.form.has_factors(layer)

    def gated(self, gate: Any) -> Form:
        return Scaled(self.form.gated(gate), self.factor)

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        return self.form.add_to(W, layer, rows, scale * self.factor)

    def spread(self, rows: Rows) -> Form:
        return Scaled(self.form.spread(rows), self.factor)

    def terms(self, scale: float = 1.0) -> tuple[Form, ...]:
        return self.form.terms(scale * self.factor)

    def materialise(self) -> Tensor:
        return self.form.materialise() * self.factor

    def formation(self) -> sympy.Expr:
        return self.form.formation()

    def transpose(self) -> Form:
        return Scaled(self.form.T, self.factor)

    def squares(self) -> Any:
        return self.form.squares() * self.factor**2

    def gram(self, other: Form) -> Any:
        return self.form.gram(other) * self.factor

    def shift(self) -> Tensor | None:
        shift = self.form.shift()
        return None if shift is None else shift * self.factor

    def cost(self) -> sympy.Expr:
        return self.form.cost()


@dataclass(frozen=True)
class Sum(Form):
    """The sum of several updates of one weight."""

    parts: tuple[Form, ...]

    def terms(self, scale: float = 1.0) -> tuple[Form, ...]:
        return tuple(t for part in self.parts for t in part.terms(scale))

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        first, *rest = (part.apply(x, layer, scale, like) for part in self.parts)
        for term in rest:
            first = first + term
        return first

    def is_light(self) -> bool:
        return all(part.is_light() for part in self.parts)

    def has_factors(self, layer: LayerMap) -> bool:
        return all(part.has_factors(layer) for part in self.parts)

    def gated(self, gate: Any) -> Form:
        return Sum(tuple(part.gated(gate) for part in self.parts))

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        for part in self.parts:
            W = part.add_to(W, layer, rows, scale)
        return W

    def spread(self, rows: Rows) -> Form:
        return Sum(tuple(part.spread(rows) for part in self.parts))

    def materialise(self) -> Tensor:
        first, *rest = (term.materialise() for term in self.parts)
        for term in rest:
            first = first + term
        return first

    def shift(self) -> Tensor | None:
        shifts = [s for term in self.parts if (s := term.shift()) is not None]
        return torch.stack(shifts).sum(0) if shifts else None

    def formation(self) -> sympy.Expr:
        return sympy.Add(*(term.formation() for term in self.parts))

    def cost(self) -> sympy.Expr:
        return sympy.Add(*(term.cost() for term in self.parts))

    def transpose(self) -> Form:
        return Sum(tuple(term.T for term in self.parts))

    def squares(self) -> Any:
        total = None
        for number, part in enumerate(self.parts):
            for term in [part.squares(), *(2 * part.gram(other) for other in self.parts[number + 1 :])]:
                total = term if total is None else total + term
        return total

    def gram(self, other: Form) -> Any:
        first, *rest = (term.gram(other) for term in self.parts)
        for term in rest:
            first = first + term
        return first


@dataclass(frozen=True)
class Spread(Form):
    """`form` at some rows of a larger matrix; forms that can say so in their own tensors do."""

    form: Form
    rows: Rows

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        return self.rows.put(self.form.apply(x, layer, scale, like), layer.channel)

    def is_light(self) -> bool:
        return self.form.is_light()

    def has_factors(self, layer: LayerMap) -> bool:
        return self.form.has_factors(layer)

    def formation(self) -> sympy.Expr:
        return self.form.formation()

    def materialise(self) -> Tensor:
        return self.rows.put(self.form.materialise())

    def shift(self) -> Tensor | None:
        shift = self.form.shift()
        return None if shift is None else self.rows.put(shift, -1)

    def cost(self) -> sympy.Expr:
        return self.form.cost()
