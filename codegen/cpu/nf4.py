"""NF4 weights on a CPU by C++ kernels (`nf4.cpp`): decoding, and products that do not form the weight.

Decoding is bit for bit that of `rewrite.codegen.nf4`.  A product takes the weight as it decodes: rounded to the
weight's dtype, then to that of x.  With few tokens it is summed in float32, in an order that does not depend on the
number of threads; with more, pieces of the decoded weight that caches hold go to PyTorch's own product.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from rewrite.codegen.cpu.build import Build, build, instruction_sets
from rewrite.codegen.nf4 import CODE, check_stored
from rewrite.codegen.tensors import is_eager

Tensor = torch.Tensor

_SOURCE = Path(__file__).with_name("nf4.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODE = (ctypes.c_float * 16)(*CODE)
_LANES, _GROUP, _GROUPED = 32, 16, 2  # what rows, and tokens, are padded to; the layout of `nf4.cpp` that groups them
_DEPTH = 1024  # rows of the weight in one partial sum of an input gradient
_PIECE = (
    1 << 23
)  # bytes of a weight that are decoded at a time, for which a thread keeps its memory: fresh pages cost more
_FEW, _FEW_FLOAT32, _FEW_TILES = 16, 48, 64  # tokens up to which the weight is not formed, by how it is multiplied then


class _Weight(ctypes.Structure):
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
        self._decode(self._weight(1, self.numel, out.dtype), (0, 1), (0, self.numel), out)
        return out.to(self.dtype)  # float64 is the float32 product, widened

    def product(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (M, d_out) = x (M, d_in) W' + bias, for a weight of two dimensions; `out` is contiguous, as x typed."""
        if x.shape[0] <= self._few(x.dtype):
            y = self._few_product(x)
            torch.add(y, bias, out=out) if bias is not None else out.copy_(y)
            return
        dtype = _product_dtype(x.dtype)
        given, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        for first, last, w in self._pieces(0, dtype, x.dtype):
            part = out[:, first:last]
            into = part if dtype == x.dtype else part.new_empty(part.shape, dtype=dtype)
            if bias is None:
                torch.mm(given, w.t(), out=into)
            else:
                torch.addmm(bias[first:last], given, w.t(), out=into)
            if into is not part:
                part.copy_(into)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy (M, d_out) W, (M, d_in), for a weight of two dimensions."""
        if dy.shape[0] <= self._few(dy.dtype):
            return self._few_gradient(dy).to(dy.dtype)
        dtype = _product_dtype(dy.dtype)
        given, out = dy.to(dtype), dy.new_empty(dy.shape[0], self.shape[1], dtype=dtype)
        for first, last, w in self._pieces(1, dtype, dy.dtype):  # of columns, so that each sum is rounded once
            torch.mm(given, w, out=out[:, first:last])
        return out.to(dy.dtype)

    def _few(self, dtype: torch.dtype) -> int:
        """Tokens up to which products in `dtype` do not form the weight, measured against forming it; -1: they do."""
        if dtype not in _DTYPES:
            return -1
        if self.library.nf4_layout(_DTYPES[dtype], _FEW_TILES) == _GROUPED:
            return _FEW_TILES
        return _FEW_FLOAT32 if _product_dtype(dtype) == torch.float32 else _FEW

    def _few_product(self, x: Tensor) -> Tensor:
        (rows, columns), tokens = self.shape, x.shape[0]
        weight, (given, grouped) = self._weight(rows, columns, x.dtype), self._given(x)
        if grouped:
            given = given.view(-1, _GROUP, given.shape[1] // 2, 2).transpose(1, 2).contiguous()
        y = torch.empty(tokens, rows)
        self.library.nf4_product(weight, given.data_ptr(), tokens, y.data_ptr(), torch.get_num_threads())
        return y

    def _few_gradient(self, dy: Tensor) -> Tensor:
        (rows, columns), tokens = self.shape, dy.shape[0]
        weight, (given, _) = self._weight(rows, columns, dy.dtype), self._given(dy)
        held, stride = given.shape[0], self.library.nf4_gradient_stride(columns)
        parts, dx = torch.empty(-(-rows // _DEPTH), held, stride), torch.empty(tokens, columns)
        sizes, made = (tokens, held, _DEPTH), (parts.data_ptr(), dx.data_ptr())
        self.library.nf4_input_gradient(weight, given.data_ptr(), *sizes, *made, torch.get_num_threads())
        return dx

    def _given(self, x: Tensor) -> tuple[Tensor, bool]:
        """Rows as the kernels take them, padded with zeros, and whether they want 16 of them together."""
        layout = self.library.nf4_layout(_DTYPES[x.dtype], x.shape[0])
        x = x if layout else x.float()
        padding = (0, -x.shape[1] % _LANES, 0, -x.shape[0] % _GROUP if layout == _GROUPED else 0)
        return (F.pad(x, padding) if any(padding) else x.contiguous()), layout == _GROUPED

    def _pieces(self, dim: int, dtype: torch.dtype, product: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last, the rows or columns from first to last), one after the other in the same memory."""
        rows, columns = self.shape
        weight = self._weight(rows, columns, product)
        count, across = (rows, columns) if dim == 0 else (columns, rows)
        made = dtype if dtype in _DTYPES else torch.float32
        step = max(_PIECE // made.itemsize // max(across, 1) // 64, 1) * 64
        memory = _scratch(min(step, count) * across * made.itemsize).view(made)
        for first in range(0, count, step):
            last = min(first + step, count)
            spans = ((first, last), (0, columns)) if dim == 0 else ((0, rows), (first, last))
            w = memory[: (last - first) * across].view(*(stop - start for start, stop in spans))
            self._decode(weight, *spans, w)
            yield first, last, w.to(dtype)

    def _decode(self, weight: _Weight, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> None:
        where = (rows[0], rows[1] - rows[0], columns[0], columns[1] - columns[0])
        self.library.nf4_decode(weight, *where, out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads())

    def _weight(self, rows: int, columns: int, product: torch.dtype) -> _Weight:
        pointers = (None if t is None else t.data_ptr() for t in self._held)
        dtypes = (_DTYPES.get(t, 0) for t in (self.dtype, product))
        return _Weight(ctypes.addressof(_CODE), *pointers, rows, columns, self.blocksize, *dtypes)


def _float32(t: Tensor) -> Tensor:
    # Calls of PyTorch that would give the same tensor take as long as a small product.
    t = t if t.dtype == torch.float32 else t.detach().to(torch.float32)
    return t if t.is_contiguous() else t.contiguous()


_threads = threading.local()


def _scratch(size: int) -> Tensor:
    """So many bytes that this thread uses again and again; larger ones than `_PIECE` are not kept."""
    held: Tensor | None = getattr(_threads, "scratch", None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        if size <= _PIECE:
            _threads.scratch = held
    return held[:size]


@functools.cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of larger products of such numbers: where the processor has no product in 16 bits, float32."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if name is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()):
        return dtype
    return torch.float32


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    weight, pointer, size, number = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.nf4_decode.argtypes = [weight, size, size, size, size, pointer, number, number]
    library.nf4_product.argtypes = [weight, pointer, size, pointer, number]
    library.nf4_input_gradient.argtypes = [weight, pointer, size, size, size, pointer, pointer, number]
    library.nf4_layout.argtypes, library.nf4_layout.restype = [number, size], number
    library.nf4_gradient_stride.argtypes, library.nf4_gradient_stride.restype = [size], size
    return library
