"""Block-circulant matrices, applied by fast Fourier transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, OUT, TOKENS, Form, cast
from rewrite.codegen.maps import LINEAR, LayerMap


@dataclass(frozen=True)
class Circulant(Form):
    """Circulant blocks of size b: w (..., d_out / b, d_in / b, b) holds the first row of each.

    Row k of a block is its first row shifted k places to the right.  Its product is a circular correlation, which is
    a product of Fourier coefficients (Chen et al. 2024); numbers of half precision are transformed in single.

    >>> Circulant(torch.tensor([[[1.0, 2.0, 3.0]]])).materialise()
    tensor([[1., 2., 3.],
            [3., 1., 2.],
            [2., 3., 1.]])
    """

    w: Any

    def materialise(self) -> torch.Tensor:
        b = self.w.shape[-1]
        # Windows of (w, w): the one from b - k is row k.
        rows = torch.cat([self.w, self.w], dim=-1).unfold(-1, b, 1).narrow(-2, 1, b).flip(-2)
        return rows.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def apply(self, x: Any, layer: LayerMap = LINEAR, scale: float = 1.0, like: Any = None) -> Any:
        if not self.has_factors(layer) or x.dtype.itemsize > 2:
            return super().apply(x, layer, scale, like)
        return cast(super().apply(x.to(torch.float32), layer, scale), x)

    def factored(self, x: Any) -> Any:
        if 0 in x.shape:  # which no transform takes on every device
            return F.linear(x, self.materialise())
        n, b = self.w.shape[-2:]
        X = torch.fft.rfft(x.unflatten(-1, (n, b)))
        Y = torch.einsum("...nf,mnf->...mf", X, torch.fft.rfft(self.w).conj())
        return torch.fft.irfft(Y, n=b).flatten(-2)

    def cost(self) -> sympy.Expr:
        # A real transform of n numbers takes about n log2 n multiply-adds; half of the coefficients say the rest.
        b = self.w.shape[-1]
        return TOKENS * (2 * IN * OUT / b + (IN + OUT) * b.bit_length())

    def transpose(self) -> Form:
        return Circulant(self.w.transpose(-3, -2).flip(-1).roll(1, -1))
