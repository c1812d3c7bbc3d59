"""Low-rank matrices, with a diagonal or square core between the factors where a method has one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

import rewrite.codegen.ops  # noqa: F401  (defines torch.ops.rewrite)
from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form, cast
from rewrite.codegen.maps import LINEAR, LayerMap, Lookup, Matmul, Rows
from rewrite.codegen.weights import low_rank_weight

Tensor = torch.Tensor


@dataclass(frozen=True)
class LowRank(Form):
    """`M = B C A` with A (..., r, d_in), B (..., d_out, r) and a core C: a diagonal (r,), a matrix (r, r), or 1.

    The plain one is Hu et al. 2021.  A core keeps frozen factors out of the backward pass: its gradient needs the
    (tokens, r) product alone, never the input.

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).materialise().shape
    torch.Size([3, 2])
    """

    B: Any
    A: Any
    core: Any = None
    gate: Any = None  # as `Form.gated` has it

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        by_row = self.gate is not None and self.gate.ndim > 1
        if isinstance(layer, Matmul) and isinstance(x, torch.Tensor) and x.dtype != self.A.dtype and not by_row:
            return torch.ops.rewrite.low_rank(x, self.A, self.left, scale)  # eager autograd would save the casts
        # The scale goes on the (..., r) product: it is the smallest tensor on the way.
        h = layer.shrink(x, self.A if layer.reads_ids else cast(self.A, x))
        h = h if like is None else cast(h, like)
        last = isinstance(layer, Matmul | Lookup)  # where channels are the last dimension
        if self.core is not None and last:
            core = cast(self.core, h)
            h = h * core if core.ndim == 1 else torch.nn.functional.linear(h, core)
        h = h if self.gate is None else h * cast(self.gate, h)
        return layer.expand(h if scale == 1.0 else h * scale, cast(self.B if last else self._with_core, h))

    @property
    def left(self) -> Any:
        """The factor before A: B C, gated."""
        return self._with_core if self.gate is None else self._with_core * self.gate

    @property
    def _with_core(self) -> Any:
        return self.B if self.core is None else self.B * self.core if self.core.ndim == 1 else self.B @ self.core

    def materialise(self) -> Tensor:
        return self.left @ self.A

    def formation(self) -> sympy.Expr:
        return self.A.shape[-2] * IN * OUT

    def cost(self) -> sympy.Expr:
        rank = self.A.shape[-2]
        square = self.core is not None and self.core.ndim == 2
        return TOKENS * rank * (IN + OUT + (rank if square else 0))

    def add_to(self, W: Any, layer: LayerMap = LINEAR, rows: Rows | None = None, scale: float = 1.0) -> Any:
        if not isinstance(layer, Matmul):
            return super().add_to(W, layer, rows, scale)
        return low_rank_weight(W, self.A, self.left if rows is None else rows.put(self.left), scale, layer.transposed)

    def is_light(self) -> bool:
        return True

    def has_factors(self, layer: LayerMap) -> bool:
        return True

    def gated(self, gate: Any) -> Form:
        return replace(self, gate=gate if self.gate is None else self.gate * gate)  # on the (..., r) product

    def spread(self, rows: Rows) -> Form:
        return replace(self, B=rows.put(self.B))

    def by_rows(self, d: Any) -> Form:
        return replace(self, B=self.B * d[..., :, None])

    def transpose(self) -> Form:
        core = self.core.transpose(-2, -1) if self.core is not None and self.core.ndim == 2 else self.core
        return LowRank(self.A.transpose(-2, -1), self.B.transpose(-2, -1), core, self.gate)

    def squares(self) -> Any:
        return self.gram(self)

    def gram(self, other: Form) -> Any:
        if not isinstance(other, LowRank):
            return other.gram(self)
        return ((self.left @ (self.A @ other.A.transpose(-2, -1))) * other.left).sum(-1)

    def __add__(self, other: Form) -> Form:
        return self._stacked(other.left, other.A) if isinstance(other, LowRank) else super().__add__(other)

    def __sub__(self, other: Form) -> Form:
        return self._stacked(-other.left, other.A) if isinstance(other, LowRank) else super().__sub__(other)

    def _stacked(self, B: Any, A: Any) -> LowRank:
        # B A + B' A' = [B, B'] [A; A']: one branch of the summed rank.
        return LowRank(torch.cat([self.left, B], dim=-1), torch.cat([self.A, A], dim=-2))


def spread_over(T: Any, A: Any) -> Any:
    """A (r, channels) spread over a kernel by T (r, r, kernel): (r, channels * kernel)."""
    return A if T is None else (T.transpose(-2, -1) @ A).transpose(-2, -1).flatten(-2)
