"""Dropout on a CPU by C++ kernels (`dropout.cpp`), to the bit that of `rewrite.codegen.masks`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from rewrite.codegen.cpu.build import Build, build, instruction_sets
from rewrite.codegen.masks import threshold
from rewrite.codegen.tensors import is_eager

Tensor = torch.Tensor

_SOURCE = Path(__file__).with_name("dropout.cpp")


def kernels(target: str | None = None) -> Build:
    """The library of this module for one of the `instruction_sets`, by default the best; not compiled yet."""
    return build(_SOURCE, target or instruction_sets()[0])


def route() -> str:
    """What computes masks on this CPU, and why it is not the kernels where it is not: a line."""
    return kernels().route()


def copied(x: Tensor, seed: Tensor, p: float, found: Build | None = None) -> Tensor | None:
    """The elements of a matrix that are kept, zero elsewhere; None where the kernels do not serve."""
    library = _library(x, seed, found)
    if library is None or x.dtype.itemsize not in (2, 4, 8):
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    matrices = (x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), *x.shape)
    library.dropout_copy(*matrices, seed.data_ptr(), threshold(p), x.dtype.itemsize, torch.get_num_threads())
    return out


def added(y: Tensor, x: Tensor, seed: Tensor, p: float, found: Build | None = None) -> bool:
    """`y += x` where x is kept, matrices of float32; False, and nothing done, where the kernels do not serve."""
    library = _library(x, seed, found)
    rows_are_dense = y.stride(-1) == x.stride(-1) == 1
    if library is None or not rows_are_dense or not x.dtype == y.dtype == torch.float32:
        return False
    matrices = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), *x.shape)
    library.dropout_add(*matrices, seed.data_ptr(), threshold(p), torch.get_num_threads())
    return True


def _library(x: Tensor, seed: Tensor, found: Build | None) -> ctypes.CDLL | None:
    if not is_eager(x, seed) or not (x.is_cpu and seed.is_cpu):
        return None
    library = (found or kernels()).library()
    return None if library is None else _declared(library)


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrices = [pointer, size, pointer, size, size, size]
    library.dropout_copy.argtypes = [*matrices, pointer, number, number, number]
    library.dropout_add.argtypes = [*matrices, pointer, number, number]
    return library
