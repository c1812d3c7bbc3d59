"""Interpreted launches whose every access is checked, since a CPU forgives what a GPU does not.

The interpreter runs programs one after the other, beside memory that is mapped.  On a GPU they run at once, and what
lies behind a tensor is another tensor, or nothing.  So each address must lie within an argument, and none that a
program stores may another program load or store.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rewrite.codegen.kernels import kernel


class Launch:
    """The accesses of one launch."""

    def __init__(self, name: str, arguments: Sequence[Any]) -> None:
        self.name = name
        self.spans = [_span(t) for t in arguments if isinstance(t, torch.Tensor) and t.numel()]
        self.stored: dict[int, tuple[int, ...]] = {}
        self.loaded: dict[int, set[tuple[int, ...]]] = {}

    def access(self, program: tuple[int, ...], addresses: np.ndarray, size: int, store: bool) -> None:
        """Of elements of so many bytes."""
        within = [(addresses >= first) & (addresses + np.uint64(size) <= last) for first, last in self.spans]
        assert np.all(np.any(within, axis=0)), f"{self.name}: program {program} reads or writes past its arguments"
        found = addresses.tolist()
        if store:
            assert len(set(found)) == len(found), f"{self.name}: program {program} stores an element twice at once"
        for address in found:
            if store:
                self.stored.setdefault(address, program)
            else:
                self.loaded.setdefault(address, set()).add(program)
            others = {self.stored.get(address, program)}
            others |= self.loaded.get(address, set()) if address in self.stored else set()
            assert others == {program}, f"{self.name}: programs {sorted(others | {program})} share a stored element"


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor, and that behind its last element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


@functools.cache
def install() -> None:
    """Check the launches of this process from now on, once."""
    from triton.runtime import interpreter

    Builder: Any = interpreter.InterpreterBuilder
    load, store, call = Builder.create_masked_load, Builder.create_masked_store, kernel._Launch.__call__
    running: list[Launch] = []

    def check(builder: Any, pointers: Any, mask: Any, stores: bool) -> None:
        if running:  # not of a test's own kernel
            shown = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            running[-1].access(tuple(builder.grid_idx), pointers.data[shown].astype(np.uint64), size, stores)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(self, pointers, mask, False)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(self, pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    def launch(self: kernel._Launch, arguments: Sequence[Any]) -> None:
        running.append(Launch(self.kernel.name, arguments))
        try:
            call(self, arguments)
        finally:
            running.pop()

    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    setattr(kernel._Launch, "__call__", launch)  # noqa: B010
