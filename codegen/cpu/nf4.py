"""NF4 weights on a CPU by C++ kernels (`nf4.cpp`): decoding, bit for bit that of `rewrite.codegen.nf4`.

Products are those of the operators in C++ (`operators.py`, `nf4_linear.h`), which are handed the kernels from here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from rewrite.codegen.cpu.build import Build, build, instruction_sets
from rewrite.codegen.nf4 import CODE, check_stored
from rewrite.codegen.tensors import is_eager

Tensor = torch.Tensor

_SOURCE = Path(__file__).with_name("nf4.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODE = (ctypes.c_float * 16)(*CODE)
_PIECE = 1 << 23  # bytes of a weight that are decoded at a time for larger products


class _Weight(ctypes.Structure):  # of `nf4_kernels.h`
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "codes", "absmax", "absmax_codes", "nested_absmax")),
        *((name, ctypes.c_void_p) for name in ("nested_code", "offset")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "blocksize")),
        *((name, ctypes.c_int32) for name in ("dtype", "product")),
    )


def kernels(target: str | None = None) -> Build:
    """The library of this module for one of the `instruction_sets`, by default the best; not compiled yet."""
    return build(_SOURCE, target or instruction_sets()[0])


def route() -> str:
    """What computes with NF4 weights on this CPU, and why it is not the kernels where it is not: a line."""
    return kernels().route()


def unreadable(stored: Sequence[Tensor], found: Build | None = None) -> str | None:
    """Why the kernels do not read the stored tensors, or None; compiles the kernels if it comes to that."""
    if not is_eager(*stored) or not all(t.is_cpu for t in stored):
        return "tensors without numbers on a CPU"
    found = found or kernels()
    return None if found.library() is not None else found.refusal()


def decoded(stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, blocksize: int) -> Tensor | None:
    """The weight by the kernels; None where they do not serve: traced, not on a CPU, not to be had."""
    return None if unreadable(stored) else Packed(stored, shape, dtype, blocksize).decode()


class Packed:
    """One NF4 weight as the kernels read it: `codes, absmax`, or `codes, absmax (uint8), absmax, code, offset`.

    The tensors are `unreadable` for no reason.
    """

    def __init__(
        self,
        stored: Sequence[Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        blocksize: int,
        found: Build | None = None,
    ) -> None:
        library = (found or kernels()).library()
        assert library is not None
        self.library, self.shape, self.dtype, self.blocksize = _declared(library), tuple(shape), dtype, blocksize
        self.numel = torch.Size(shape).numel()
        codes, absmax, *nested = stored
        check_stored(codes, absmax, nested, self.numel, blocksize)
        floats = [_float32(t) for t in (nested or [absmax])]
        scales = [None, absmax.contiguous(), *floats] if nested else [*floats, None, None, None, None]
        self._held = [codes.contiguous(), *scales]  # the pointers are into these

    def decode(self) -> Tensor:
        """The weight in its own dtype, as `rewrite.codegen.nf4.dequantize` gives it."""
        out = torch.empty(self.shape, dtype=self.dtype if self.dtype in _DTYPES else torch.float32)
        where = (0, 1, 0, self.numel)
        self.library.nf4_decode(self._weight(), *where, out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads())
        return out.to(self.dtype)  # float64 is the float32 product, widened

    def _weight(self) -> _Weight:
        """As one row, which decodes like a weight of any number of dimensions."""
        pointers = (None if t is None else t.data_ptr() for t in self._held)
        dtype = _DTYPES.get(self.dtype, 0)
        return _Weight(ctypes.addressof(_CODE), *pointers, 1, self.numel, self.blocksize, dtype, dtype)


def _float32(t: Tensor) -> Tensor:
    # Calls of PyTorch that would give the same tensor take as long as a small product.
    t = t if t.dtype == torch.float32 else t.detach().to(torch.float32)
    return t if t.is_contiguous() else t.contiguous()


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products of such numbers, of 16 bits."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    weight, pointer, size, number = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.nf4_decode.argtypes = [weight, size, size, size, size, pointer, number, number]
    library.nf4_kernels.argtypes, library.nf4_kernels.restype = [], pointer
    return library


class _Handed(ctypes.Structure):  # `Nf4` of `nf4_kernels.h`
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kernels", "code")),
        ("piece", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bfloat16", "float16")),
    )


_handed: list[_Handed] = []  # operators in another thread may be reading any of them


def hand_over(library: ctypes.CDLL, to: ctypes.CDLL) -> None:
    """Have the operators of a library multiply with the kernels of another."""
    multiplies = map(_multiplies, (torch.bfloat16, torch.float16))
    given = _Handed(_declared(library).nf4_kernels(), ctypes.addressof(_CODE), _PIECE, *multiplies)
    _handed.append(given)
    to.rewrite_take_nf4(ctypes.byref(given))
