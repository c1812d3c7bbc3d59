"""Triton's interpreter made right for bfloat16: casts that round to nearest, and products of values, not of bits.

With `TRITON_INTERPRET=1` kernels run on CPU tensors, in numpy, which holds bfloat16 as 16-bit integers.  Up to Triton
3.7, float32 is cut off where a GPU rounds to the nearest even number, and `tl.dot` multiplies the integers.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np


def active() -> bool:
    """Whether kernels are interpreted in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    with np.errstate(over="ignore"):
        rounded = ((bits + even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@functools.cache
def repair() -> None:
    """Replace the interpreter's casts from and to bfloat16, its `tl.dot`, and numbers as ends of a loop, once."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    Builder: Any = InterpreterBuilder
    cast, dot = Builder.cast_impl, Builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(narrow(cast(self, src, tl.float32).data), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast(self, TensorHandle(widen(src.data), tl.float32), target)
        return cast(self, src, dst_type)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        values = [TensorHandle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return dot(self, *values, d, *rest)

    original = Builder.create_fp_to_fp
    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        setattr(Builder, name, cast_impl)
    Builder.create_fp_to_fp = fp_to_fp
    Builder.create_dot = create_dot

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Up to Triton 3.6: int(array of one element), which numpy refuses from 2.4 on.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch = interpreter._patch_lang_tensor
    setattr(interpreter, "_patch_lang_tensor", patch_tensor)  # noqa: B010
