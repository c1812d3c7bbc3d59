"""Codecs of saved activations: floating-point values as 8-bit codes with a scale per group of the last dimension.

The reference in plain PyTorch, which a pass traces into the graphs that Inductor compiles, and operators of it for
eager models, which one kernel computes on a GPU:

- `rewrite::encode_saved(x, codec, group)`                       codes and scales
- `rewrite::decode_saved(codes, scales, codec, group, dtype)`    the values

A value that is not finite is decoded as NaN, and takes no part in the scale of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from rewrite.codegen.kernels import codecs as kernels

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("encode_saved(Tensor x, str codec, int group) -> (Tensor, Tensor)")
_lib.define("decode_saved(Tensor codes, Tensor scales, str codec, int group, ScalarType dtype) -> Tensor")


@dataclass(frozen=True)
class Codec:
    """How a tensor is kept in fewer bits: `encode` makes the stored tensors, `decode` its values back.

    Codes have the shape (..., n) of the tensor, scales (..., ceil(n / group)).
    """

    group: int = 128
    name: ClassVar[str]
    code: ClassVar[torch.dtype]
    largest: ClassVar[float]
    """The largest value that a code stands for."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(codes, scales) of a floating-point tensor (..., n)."""
        group = self.size(x.shape[-1])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        finite = torch.where(wide.isfinite(), wide, 0)
        scales = self.scales(_padded(finite, group).unflatten(-1, (-1, group)).abs().amax(-1), x.dtype)
        return self.round(_each(torch.div, wide, self.factors(scales, wide.dtype), group)).to(self.code), scales

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The values behind what `encode` made, in `dtype`."""
        codes, scales = stored
        wide = torch.promote_types(dtype, torch.float32)
        factors, group = self.factors(scales, wide), self.size(codes.shape[-1])
        return _each(torch.mul, self.values(codes, wide), factors, group).to(dtype)

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """What the stored tensors of a tensor of that shape and dtype take."""
        rows, n = torch.Size(shape[:-1]).numel(), shape[-1]
        return rows * (n + -(-n // self.size(n)) * self.scale_dtype(dtype).itemsize)

    def size(self, n: Any) -> Any:
        """Values in one group of a row of n."""
        return min(self.group, n) if isinstance(n, int) and n else self.group

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the scales of a tensor of `dtype`."""
        raise NotImplementedError

    def scales(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The stored scales of groups with these largest magnitudes."""
        raise NotImplementedError

    def factors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes are multiplied by, in `dtype`; never zero."""
        raise NotImplementedError

    def round(self, values: Tensor) -> Tensor:
        """Values that were divided by their factor, as codes hold them but for the dtype."""
        raise NotImplementedError

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes, before they are multiplied."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fp8(Codec):
    """float8 e4m3 (3 bits of mantissa) times a power of two per group: a relative error of at most 2^-4.

    The scale is one byte, the biased exponent of a float32; so values that differ by a power of two from what e4m3
    represents come back exactly.
    """

    name = "fp8"
    code = torch.float8_e4m3fn
    largest = 448.0

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def scales(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        exponent = largest.to(torch.float32).view(torch.int32) >> 23  # biased: largest < 2^(exponent - 126)
        return (exponent - 7).clamp(1, 247).to(torch.uint8)  # so that the largest code is between 128 and 256

    def factors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (scales.to(torch.int32) << 23).view(torch.float32).to(dtype)

    def round(self, values: Tensor) -> Tensor:
        return torch.where(values.isfinite(), values.clamp(-self.largest, self.largest), torch.nan)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(torch.float32).to(dtype)


@dataclass(frozen=True)
class Int8(Codec):
    """Whole numbers from -127 to 127 times a scale per group: an error of at most 1/254 of the largest of the group.

    Scales are bfloat16 for tensors of 16 bits, else float32.
    """

    name = "int8"
    code = torch.int8
    largest = 127.0

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype.itemsize == 2 else torch.float32

    def scales(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        # A product: by a number that is no tensor, CUDA and Inductor divide as a product with its reciprocal.
        return (largest * (1 / self.largest)).to(self.scale_dtype(dtype))

    def factors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        wide = scales.to(dtype)
        return torch.where(wide > 0, wide, 1)

    def round(self, values: Tensor) -> Tensor:
        bounded = values.round().clamp(-self.largest, self.largest)  # -128 stands for what is not finite
        return torch.where(values.isfinite(), bounded, -128)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(codes == -128, torch.nan, codes.to(dtype))


CODECS: dict[str, type[Codec]] = {cls.name: cls for cls in (Fp8, Int8)}
"""The codecs by the name that a spec has for them."""


def _encode(x: Tensor, codec: str, group: int) -> tuple[Tensor, ...]:
    return CODECS[codec](group).encode(x.contiguous())


def _decode(codes: Tensor, scales: Tensor, codec: str, group: int, dtype: torch.dtype) -> Tensor:
    return CODECS[codec](group).decode((codes.contiguous(), scales), dtype)


def _encoded_empty(x: Tensor, codec: str, group: int) -> tuple[Tensor, Tensor]:
    kind = CODECS[codec](group)
    count = -(-x.shape[-1] // kind.size(x.shape[-1]))
    codes = torch.empty(x.shape, dtype=kind.code, device=x.device)
    return codes, x.new_empty((*x.shape[:-1], count), dtype=kind.scale_dtype(x.dtype))


def _decoded_empty(codes: Tensor, scales: Tensor, codec: str, group: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _encode_cuda(x: Tensor, codec: str, group: int) -> tuple[Tensor, ...]:
    if kernels.supports(codec, group, x.shape[-1], x.dtype, x.device) is not None:
        return _encode(x, codec, group)
    codes, scales = _encoded_empty(x, codec, group)
    kernels.encode(x, codec, group, codes, scales)
    return codes, scales


def _decode_cuda(codes: Tensor, scales: Tensor, codec: str, group: int, dtype: torch.dtype) -> Tensor:
    if kernels.supports(codec, group, codes.shape[-1], dtype, codes.device) is not None:
        return _decode(codes, scales, codec, group, dtype)
    out = _decoded_empty(codes, scales, codec, group, dtype)
    kernels.decode(codes, scales, codec, group, out)
    return out


_lib.impl("encode_saved", _encode, "CompositeExplicitAutograd")
_lib.impl("decode_saved", _decode, "CompositeExplicitAutograd")
_lib.impl("encode_saved", _encode_cuda, "CUDA")
_lib.impl("decode_saved", _decode_cuda, "CUDA")
torch.library.register_fake("rewrite::encode_saved", _encoded_empty, lib=_lib)
torch.library.register_fake("rewrite::decode_saved", _decoded_empty, lib=_lib)


def memory_order(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions of a tensor from the slowest to the fastest; None where there are gaps between its values.

    >>> memory_order((2, 3, 5), (15, 1, 3)), memory_order((2, 3), (6, 2))
    ((0, 2, 1), None)
    """
    order, expected = sorted(range(len(sizes)), key=lambda d: -strides[d]), 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != expected:
            return None
        expected *= max(sizes[d], 1)
    return tuple(order) or None


def _padded(x: Tensor, group: Any) -> Tensor:
    """A tensor (..., n) with zeros behind, so that n is a multiple of `group`."""
    rest = -x.shape[-1] % group
    return x if isinstance(rest, int) and rest == 0 else F.pad(x, (0, rest))


def _each(op: Callable[[Tensor, Tensor], Tensor], x: Tensor, factors: Tensor, group: Any) -> Tensor:
    """An operator between the values (..., n) and the factors (..., groups) of their groups."""
    n = x.shape[-1]
    if isinstance(n, int) and n % group == 0:
        return op(x.unflatten(-1, (n // group, group)), factors.unsqueeze(-1)).flatten(-2)
    # Looked up, not repeated: for what is repeated and cut Inductor 2.13 computes wrong addresses on the CPU.
    return op(x, factors.index_select(-1, torch.arange(n, device=x.device) // group))
