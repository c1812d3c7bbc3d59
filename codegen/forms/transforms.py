"""Fixed orthogonal transforms that are cheaper than a matrix product: cosines and Walsh functions.

- `rewrite::walsh(x, d_out)`   the transform of x (..., d_in), filled up with zeros; its gradient is the same operator

They have no tensors of their own: `like` is any tensor of the dtype and on the device that a dense matrix is to have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewrite.codegen.forms.form import IN, TOKENS, Form, cast
from rewrite.codegen.kernels import walsh as kernels

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("walsh(Tensor x, SymInt d_out) -> Tensor")


@dataclass(frozen=True)
class Cosine(Form):
    """The orthonormal discrete cosine transform of n numbers, of type II, or its transpose and inverse, of type III.

    By one real Fourier transform of the numbers in another order (Makhoul 1980); half precision is transformed in
    single.

    >>> Cosine(2, torch.ones(1)).materialise()
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """

    n: int
    like: Any
    inverse: bool = False

    def factored(self, x: Any) -> Any:
        if 0 in x.shape:  # which no transform takes on every device
            return F.linear(x, self.materialise())
        wide = x.to(torch.float32) if x.dtype.itemsize < 4 else x
        # An orthonormal vector k has the length sqrt(2 / n), that of the constant one is sqrt(1 / n).
        norm = F.pad(wide.new_full((self.n - 1,), math.sqrt(2 / self.n)), (1, 0), value=math.sqrt(1 / self.n))
        y = self._values(wide / norm) if self.inverse else self._coefficients(wide) * norm
        return cast(y, x)

    def _rotation(self, x: Any) -> tuple[Any, Any]:
        angle = (x.new_ones(self.n // 2 + 1).cumsum(0) - 1) * (math.pi / (2 * self.n))
        return angle.cos(), angle.sin()

    def _coefficients(self, x: Any) -> Any:
        """C_k = sum_j x_j cos(pi (2 j + 1) k / 2 n): e^(-i pi k / 2 n) V_k is C_k - i C_(n-k)."""
        V = torch.fft.rfft(torch.cat([x[..., 0::2], x[..., 1::2].flip(-1)], dim=-1))
        cos, sin = self._rotation(x)
        real, imaginary = V.real * cos + V.imag * sin, V.imag * cos - V.real * sin
        return torch.cat([real, -imaginary[..., 1 : self.n - self.n // 2].flip(-1)], dim=-1)

    def _values(self, C: Any) -> Any:
        half, even = self.n // 2, (self.n + 1) // 2
        mirrored = F.pad(C.flip(-1)[..., :half], (1, 0))  # C_(n-k), where C_n is 0
        C = C[..., : half + 1]
        cos, sin = self._rotation(C)
        v = torch.fft.irfft(torch.complex(C * cos + mirrored * sin, C * sin - mirrored * cos), n=self.n)
        odd = F.pad(v[..., even:].flip(-1), (0, 2 * even - self.n))
        return torch.stack([v[..., :even], odd], dim=-1).flatten(-2)[..., : self.n]

    def materialise(self) -> Tensor:
        one = torch.diag_embed(self.like.new_ones(self.n))
        return self.factored(one).transpose(-2, -1)

    def formation(self) -> sympy.Expr:
        return IN * IN * (self.n.bit_length() + 4)

    def cost(self) -> sympy.Expr:
        # A real transform of n numbers takes about n log2 n multiply-adds; the rotation of its coefficients four more.
        return TOKENS * IN * (self.n.bit_length() + 4)

    def transpose(self) -> Form:
        return Cosine(self.n, self.like, not self.inverse)


@dataclass(frozen=True)
class Walsh(Form):
    """The leading (d_out, d_in) part of the orthonormal Walsh-Hadamard matrix, in the order of Sylvester.

    That one has the larger of both sizes, rounded up to a power of two: a side of this size makes the rows, or the
    columns, of the part orthonormal.

    >>> Walsh(2, 2, torch.ones(1)).materialise()
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """

    d_out: int
    d_in: int
    like: Any

    @property
    def steps(self) -> int:
        """The whole matrix has 2^steps rows."""
        return (max(self.d_out, self.d_in) - 1).bit_length()

    def factored(self, x: Any) -> Any:
        return torch.ops.rewrite.walsh(x, self.d_out)

    def materialise(self) -> Tensor:
        one = torch.diag_embed(self.like.new_ones(self.d_in))
        return self.factored(one).transpose(-2, -1)

    def formation(self) -> sympy.Expr:
        return IN * 2**self.steps * (self.steps + 1)

    def cost(self) -> sympy.Expr:
        return TOKENS * 2**self.steps * (self.steps + 1)

    def transpose(self) -> Form:
        return Walsh(self.d_in, self.d_out, self.like)


_FACTOR = 6
"""Bits of a factor: a product with 64 rows takes as long as it takes to read and write what it multiplies."""


def _walsh(x: Tensor, d_out: int) -> Tensor:
    """By the Kronecker factors of the matrix: each multiplies the last bits of a place, and moves them up."""
    steps = (max(x.shape[-1], d_out) - 1).bit_length()
    y = F.pad(x, (0, 2**steps - x.shape[-1]))
    for start in range(0, steps, _FACTOR):
        size = 2 ** min(_FACTOR, steps - start)
        y = (y.unflatten(-1, (-1, size)) @ _signs(size, x)).transpose(-2, -1).flatten(-2)
    return (y[..., :d_out] * 2 ** (-steps / 2)).contiguous()


def _signs(size: int, like: Tensor) -> Tensor:
    """The matrix of Sylvester: -1 where the numbers of a row and a column share an odd number of bits."""
    signs = like.new_ones(1, 1)
    while signs.shape[0] < size:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    return signs


def _walsh_cuda(x: Tensor, d_out: int) -> Tensor:
    return (_walsh if kernels.supports(x, d_out) is not None else kernels.walsh)(x, d_out)


def _walsh_setup(ctx, inputs, output):
    ctx.d_in = inputs[0].shape[-1]


def _walsh_backward(ctx, dy):
    return torch.ops.rewrite.walsh(dy, ctx.d_in), None


_lib.impl("walsh", _walsh, "CompositeExplicitAutograd")
_lib.impl("walsh", _walsh_cuda, "CUDA")
torch.library.register_fake("rewrite::walsh", lambda x, d_out: x.new_empty((*x.shape[:-1], d_out)), lib=_lib)
torch.library.register_autograd("rewrite::walsh", _walsh_backward, setup_context=_walsh_setup, lib=_lib)
