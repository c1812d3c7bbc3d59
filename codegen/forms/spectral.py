"""Matrices by their spectrum: transforms of both sides of another form, which holds the coefficients.

The transforms are inverse ones, as methods train coefficients.  None of these has a product that is cheaper than the
dense one: a step forms the matrix, whose cost does not depend on the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from rewrite.codegen.forms.form import IN, OUT, Form

Tensor = torch.Tensor


@dataclass(frozen=True)
class Fourier(Form):
    """The real part of the inverse discrete Fourier transform of a real `spectrum` (d_out, d_in), along both sides.

    In the norm of `torch.fft.ifft2`, which divides by d_out d_in; in float32 or wider.

    >>> from rewrite.codegen.forms import Dense
    >>> Fourier(Dense(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))).materialise()
    tensor([[1., 1.],
            [1., 1.]])
    """

    spectrum: Form

    def materialise(self) -> Tensor:
        return torch.fft.ifft2(self.spectrum.materialise()).real

    def formation(self) -> sympy.Expr:
        return self.spectrum.formation() + 4 * IN * OUT * sympy.log(IN * OUT, 2)

    def transpose(self) -> Form:
        return Fourier(self.spectrum.T)


@dataclass(frozen=True)
class Haar(Form):
    """One level of the inverse Haar wavelet transform along both sides, cut to (d_out, d_in).

    `spectrum` has these sizes rounded up to even ones.  Its quadrants are, of 2 x 2 patches: the sums, top left; the
    differences of rows, top right; of columns, bottom left; and of both (as PyWavelets orders them).

    >>> from rewrite.codegen.forms import Dense
    >>> Haar(Dense(torch.tensor([[2.0, 0.0], [0.0, 0.0]])), 2, 2).materialise()
    tensor([[1., 1.],
            [1., 1.]])
    """

    spectrum: Form
    d_out: int
    d_in: int

    def materialise(self) -> Tensor:
        # (..., 2, H, 2, W), the four quadrants of coefficients; each patch is their signed sum.
        parts = self.spectrum.materialise().unflatten(-1, (2, -1)).unflatten(-3, (2, -1))
        left, right = parts.select(-2, 0), parts.select(-2, 1)
        rows = torch.stack([left + right, left - right], -2)
        top, bottom = rows.select(-4, 0), rows.select(-4, 1)
        whole = torch.stack([top + bottom, top - bottom], -1).flatten(-2).flatten(-3, -2) / 2
        return whole[..., : self.d_out, : self.d_in]

    def formation(self) -> sympy.Expr:
        return self.spectrum.formation() + 2 * IN * OUT

    def transpose(self) -> Form:
        return Haar(self.spectrum.T, self.d_in, self.d_out)
