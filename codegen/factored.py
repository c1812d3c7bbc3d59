"""Weights `W + scale * B A` kept in their factors, and the table of operations that read them.

A reader says once, for graphs (`passes.factor`) and for eager models (`codegen.weights`), what becomes of such a
weight: a view of it is such a weight again (`codegen.views`), a product with it is the product with W plus a factored
branch (`codegen.products`).  The dense update is never formed.  Where that cannot be, a reader answers
`NotImplemented`, and the caller reads the dense weight.  Works on tensors and on `torch.fx.Proxy` alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Factored:
    """`W + scale * B A` with W (..., out, in), or (..., in, out) where `transposed`; A (..., r, in), B (..., out, r).

    Leading dimensions (experts) are those of W in all three.
    """

    W: Any
    A: Any
    B: Any
    scale: float
    transposed: bool

    @property
    def left(self) -> Any:
        """The factor (..., rows, r), in W's dtype."""
        return self._as(self.A.transpose(-2, -1) if self.transposed else self.B)

    @property
    def right(self) -> Any:
        """The factor (..., r, columns), in W's dtype."""
        return self._as(self.B.transpose(-2, -1) if self.transposed else self.A)

    def _as(self, factor: Any) -> Any:
        return factor if factor.dtype == self.W.dtype else factor.to(self.W.dtype)

    def leading(self, change: Callable[[Any], Any]) -> Factored:
        """A change of the leading dimensions, which are the same ones in all three."""
        return Factored(change(self.W), change(self.A), change(self.B), self.scale, self.transposed)

    def along(self, dim: int, change: Callable[[Any, int], Any]) -> Factored:
        """A change along one dimension of W (negative): of the last two, it concerns one of the factors."""
        if dim < -2:
            return self.leading(lambda t: change(t, dim))
        W, of_B = change(self.W, dim), (dim == -2) != self.transposed
        A = self.A if of_B else change(self.A, -1)
        return Factored(W, A, change(self.B, -2) if of_B else self.B, self.scale, self.transposed)

    def scaled(self, h: Any) -> Any:
        """The (..., r) product, scaled: the smallest tensor on the way."""
        return h if self.scale == 1.0 else h * self.scale


@dataclass(frozen=True)
class Reader:
    """One operation on weights: its equation, and the function that factors it."""

    name: str
    equation: str
    apply: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What comes of the operation with `Factored` among its arguments; `NotImplemented` where it needs W'."""
        try:
            inspect.signature(self.apply).bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        return self.apply(*args, **kwargs)


READERS: list[Reader] = []
_BY_SPELLING: dict[Any, Reader] = {}


def reader(*functions: Any, methods: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the table under `functions`, and under the methods and torch functions of those names.

    An operator of a library that may be absent is spelled by its name, `namespace::operator`.
    """

    def enter(apply: Callable[..., Any]) -> Callable[..., Any]:
        named = [getattr(home, m, None) for m in methods for home in (torch, torch.Tensor)]
        equation = " ".join((apply.__doc__ or "").split())
        entry = Reader(apply.__name__, equation, apply)
        READERS.append(entry)
        for spelling in (*functions, *methods, *(f for f in named if callable(f))):
            _BY_SPELLING[spelling] = entry
        return apply

    return enter


def reader_of(target: Any) -> Reader | None:
    """The reader spelled by a function, an operator, or the name of a method; None where there is none."""
    if target in _BY_SPELLING:
        return _BY_SPELLING[target]
    name = getattr(target, "_qualified_op_name", None) or getattr(getattr(target, "_schema", None), "name", None)
    return _BY_SPELLING.get(name)
