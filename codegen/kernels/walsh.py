"""The Walsh-Hadamard transform on a GPU: one read and one write of the activations, between them tensor cores.

The matrix of 2^(a + b) rows is the Kronecker product of two of 2^a and 2^b: a row is a matrix (2^a, 2^b) that is
multiplied by one from the left and one from the right.  Entries are 1 and -1, so bfloat16 holds them exactly; numbers
with more bits are split into sums of numbers that it holds, so products are exact and sums are of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels import plans
from rewrite.codegen.kernels.kernel import Config, Kernel, triton_type
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many numbers of bfloat16 add up to one of a dtype."""
_SMALLEST = 4  # bits of a side of a matrix
_ONE = 7  # bits up to which there is one matrix


@dataclass(frozen=True)
class WalshTransform(Kernel):
    """y[t, i] = 2^(-bits / 2) sum of (-1)^(number of bits in i and j) x[t, j]

    What is not finite makes its whole row so.
    """

    bits: int
    d_in: int
    d_out: int
    dtype: torch.dtype

    name = "walsh"
    applies = "Walsh-Hadamard transforms of up to 8,192 numbers (4,096 but for bfloat16), and their gradients"
    cpu = "PyTorch, products with the factors of the matrix"

    def supports(self) -> str | None:
        if self.dtype not in _PARTS:
            return f"no kernel for {self.dtype}"
        largest = 13 if self.dtype == torch.bfloat16 else 12  # beyond, registers spill
        return None if self.bits <= largest else f"2^{self.bits} numbers of {self.dtype} are more than a program holds"

    @property
    def sides(self) -> tuple[int, int]:
        """Bits of the factor on the left and of that on the right."""
        if self.bits <= _ONE:
            return 0, max(self.bits, _SMALLEST)
        return self.bits // 2, self.bits - self.bits // 2

    def names(self) -> dict[str, Any]:
        left, right = (2**bits for bits in self.sides)
        first, second = _PARTS[self.dtype], 3 if self.dtype.itemsize > 2 else 2
        sizes = {"left": left, "right": right, "first": first, "second": second}
        return {**super().names(), **sizes, "scale": 2.0 ** (-self.bits / 2)}

    def arguments(self) -> Mapping[str, str]:
        pointer = f"*{triton_type(self.dtype)}"
        return {"x": pointer, "y": pointer, "tokens": "i32"}

    def space(self, target: Target) -> Sequence[Config]:
        if self.bits <= _ONE:
            return [Config.of(warps=4, ROWS=64), Config.of(warps=4, ROWS=16)]
        warps = {8: 1, 9: 1, 10: 2, 11: 2, 12: 4, 13: 8}[self.bits]
        return [Config.of(warps=warps, ROWS=8), Config.of(warps=warps, ROWS=1)]

    def choose(self, configs: Sequence[Config], **sizes: int) -> Config:
        return configs[0] if sizes["tokens"] >= 4096 else configs[1]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["tokens"] // config["ROWS"]),)


def supports(x: Tensor, d_out: int) -> str | None:
    """Why there is no kernel for the transform of x (..., d_in) to (..., d_out), or None."""
    return unusable(x.device) or _kernel(x, d_out).supports()


def walsh(x: Tensor, d_out: int) -> Tensor:
    """The first d_out numbers of the transform of x (..., d_in), which zeros fill up to a power of two."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(*x.shape[:-1], d_out)
    _kernel(x, d_out).launch(rows, y, tokens=rows.shape[0])
    return y


@plans.by_layout
def _kernel(x: Tensor, d_out: int) -> WalshTransform:
    bits = (max(x.shape[-1], d_out) - 1).bit_length()
    return WalshTransform(bits, x.shape[-1], d_out, x.dtype)


EXAMPLES = (
    WalshTransform(12, 4096, 4096, torch.bfloat16),
    WalshTransform(13, 5120, 8192, torch.bfloat16),
    WalshTransform(12, 4096, 4096, torch.float32),
    WalshTransform(7, 128, 128, torch.bfloat16),  # a head
)
