"""Some columns or some rows of a matrix: a dense small matrix at positions, zero elsewhere.

The backward of `Columns` keeps a copy of the inputs that it reads, (tokens, k), and never the whole input: a view would
keep all of it alive.  `OutputRows` needs the whole input for the gradient of its values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form, cast
from rewrite.codegen.maps import LINEAR, LayerMap, Matmul

Tensor = torch.Tensor


@dataclass(frozen=True)
class Run:
    """The positions [start, stop) out of `width`: known when a graph is made, so that all others are slices too.

    >>> Run(2, 4, 7).take(torch.arange(7)), Run(2, 4, 7).put(torch.ones(2))
    (tensor([2, 3]), tensor([0., 0., 1., 1., 0., 0., 0.]))
    """

    start: int
    stop: int
    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.width:
            raise ValueError(f"positions [{self.start}, {self.stop}) are no part of {self.width}")

    def take(self, whole: Any, dim: int = -1) -> Any:
        """A copy of what stands at these positions of `whole` along `dim`."""
        if self.stop - self.start == self.width:
            return whole
        return whole.narrow(dim, self.start, self.stop - self.start).clone(memory_format=torch.contiguous_format)

    def put(self, part: Any, dim: int = -1) -> Any:
        """`part` at these positions along `dim` (negative), zeros at the others."""
        return F.pad(part, [0] * (2 * (-dim - 1)) + [self.start, self.width - self.stop])


@dataclass(frozen=True)
class Places:
    """Positions that a tensor of integers (k,) names, out of `width`; distinct, in any order."""

    at: Any
    width: int

    def take(self, whole: Any, dim: int = -1) -> Any:
        return whole.index_select(dim, self.at)

    def put(self, part: Any, dim: int = -1) -> Any:
        # Zeros by a tensor of their shape: sizes may be symbols of a graph.
        like = F.pad(part, [0] * (2 * (-dim - 1)) + [0, self.width - part.shape[dim]])
        return torch.zeros_like(like).index_add(dim, self.at, part)


@dataclass(frozen=True)
class Columns(Form):
    """`M[:, at] = values`: values (..., d_out, k).

    >>> Columns(torch.ones(1, 2), Run(1, 3, 4)).materialise()
    tensor([[0., 1., 1., 0.]])
    """

    values: Any
    at: Any
    gate: Any = None  # as `Form.gated` has it

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if not isinstance(layer, Matmul):
            return super().apply(x, layer, scale, like)
        h = self.at.take(x)
        h = h if self.gate is None else h * cast(self.gate, h)
        return F.linear(h if scale == 1.0 else h * scale, cast(self.values, h))

    def factored(self, x: Any) -> Any:
        return self.apply(x)

    def materialise(self) -> Tensor:
        values = self.values if self.gate is None else self.values * cast(self.gate, self.values)
        return self.at.put(values)

    def is_light(self) -> bool:
        return True

    def gated(self, gate: Any) -> Form:
        return replace(self, gate=gate if self.gate is None else self.gate * gate)  # on the (..., k) inputs

    def cost(self) -> sympy.Expr:
        return TOKENS * OUT * self.values.shape[-1]

    def transpose(self) -> Form:
        return OutputRows(self.values.transpose(-2, -1), self.at, self.gate)

    def squares(self) -> Any:
        values = self.values if self.gate is None else self.values * cast(self.gate, self.values)
        return values.square().sum(-1)


@dataclass(frozen=True)
class OutputRows(Form):
    """`M[at] = values`: values (..., k, d_in).

    >>> OutputRows(torch.ones(1, 2), Run(1, 2, 3)).materialise()
    tensor([[0., 0.],
            [1., 1.],
            [0., 0.]])
    """

    values: Any
    at: Any
    gate: Any = None

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if not isinstance(layer, Matmul):
            return super().apply(x, layer, scale, like)
        y = F.linear(x, cast(self.values, x))
        y = y if self.gate is None else y * cast(self.gate, y)
        return self.at.put(y if scale == 1.0 else y * scale)

    def factored(self, x: Any) -> Any:
        return self.apply(x)

    def materialise(self) -> Tensor:
        values = self.values if self.gate is None else self.values * cast(self.gate, self.values)
        return self.at.put(values, -2)

    def is_light(self) -> bool:
        return True

    def gated(self, gate: Any) -> Form:
        return replace(self, gate=gate if self.gate is None else self.gate * gate)

    def cost(self) -> sympy.Expr:
        return TOKENS * IN * self.values.shape[-2]

    def transpose(self) -> Form:
        return Columns(self.values.transpose(-2, -1), self.at, self.gate)
