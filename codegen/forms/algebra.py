"""Combinations of forms: products, sums, multiples, parts of a larger matrix, gates.  `Form`'s operators make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from rewrite.codegen.forms.form import IN, OUT, Diagonal, Form, cast
from rewrite.codegen.maps import LINEAR, LayerMap, Matmul, Rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Product(Form):
    """`left right`: what `right` makes of x, `left` takes.

    >>> Product(Diagonal(torch.tensor([2.0])), Diagonal(torch.tensor([3.0]))).materialise()
    tensor([[6.]])
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

    def less(self, base: Form) -> Form:
        if not isinstance(self.left, Diagonal):
            return super().less(base)
        d = self.left.d  # d (base + update) - base, where base would be multiplied twice
        return Sum((self.right.less(base).by_rows(d), Product(Diagonal(d - 1), base)))

    def squares(self) -> Any:
        if isinstance(self.left, Diagonal):
            return self.left.d.square() * self.right.squares()
        return super().squares()


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

    def by_rows(self, d: Any) -> Form:
        return Scaled(self.form.by_rows(d), self.factor)

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

    def less(self, base: Form) -> Form:
        first, *rest = self.parts
        if isinstance(first, Sum):
            return Sum((first.less(base), *rest))
        if first is not base:
            return super().less(base)
        return rest[0] if len(rest) == 1 else Sum(tuple(rest))

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


def _structured(form: Form) -> bool:
    return type(form).factored is not Form.factored
