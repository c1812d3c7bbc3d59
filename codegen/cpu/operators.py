"""Our operators on a CPU in C++ (`operators.cpp`), and the route of layers with adapters.

Called by name, they go through the dispatcher once and through no Python.  A call from Python costs little while it is
hot; between products that stream through the caches it is cold whenever it runs, and took 100 to 250 us each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rewrite.codegen import storage
from rewrite.codegen.cpu import nf4
from rewrite.codegen.cpu.build import Build, build, instruction_sets, namespace
from rewrite.codegen.nf4 import check_stored
from rewrite.codegen.tensors import is_eager

Tensor = torch.Tensor

_SOURCE = Path(__file__).with_name("operators.cpp")
TARGETS = tuple(t for t in ("AVX512", "AVX2", "portable") if t in instruction_sets())
"""The instruction sets that the source tells apart, as far as this processor has them; best first."""


def kernels(target: str | None = None) -> Build:
    """The library of this module for one of the `TARGETS`, by default the best; not compiled yet."""
    return build(_SOURCE, target or TARGETS[0], operators=True)


def route() -> str:
    """What computes with adapters on this CPU, and why it is not the kernels where it is not: a line."""
    return kernels().route()


def loaded(found: Build | None = None) -> Any:
    """The namespace of the operators, compiled and loaded the first time; None where it cannot be had."""
    found = found or kernels()
    return None if found.library() is None else getattr(torch.ops, namespace(found.target))


def loaded_with_nf4() -> Any:
    """The same with the kernels for NF4 weights; None where either cannot be had."""
    operators, library = loaded(), nf4.kernels().library()
    if operators is None or library is None:
        return None
    _hand_over(library, kernels().library())
    return operators


_hand_over = functools.cache(nf4.hand_over)


def serving(*tensors: Tensor) -> Any:
    """The namespace of the operators for tensors that they take; None for others, and where it cannot be had."""
    return loaded() if is_eager(*tensors) and all(t.is_cpu for t in tensors) else None


def norms_serve(weight: Sequence[Any], layout: str, A: Any, B: Any) -> bool:
    """Whether `adapted_row_norms` takes these: tensors, or what else has a dtype."""
    return layout == "dense" and all(t.dtype == torch.float32 for t in (weight[0], A, B))


def product_unsuitable(x: Any, weight: Sequence[Any], layout: str, skip: Sequence[int]) -> str | None:
    """Why `adapted_linear_core` does not take these, tensors or what else has a dtype, or None."""
    if skip:
        return "columns that are left out"
    if layout != "dense":
        return _not_stored_as_nf4(layout)
    return None if weight[0].dtype == x.dtype else f"a weight of {weight[0].dtype} for {x.dtype}"


def input_gradient_unsuitable(layout: str) -> str | None:
    """Why `linear_input_gradient` does not take a weight, or None."""
    return "one product of PyTorch" if layout == "dense" else _not_stored_as_nf4(layout)


def _not_stored_as_nf4(layout: str) -> str | None:
    return None if stores_nf4(layout) else "a weight that is not stored as NF4"


def stores_nf4(layout: str) -> bool:
    """Whether a weight's stored tensors are those of NF4."""
    return layout.startswith("nf4:")


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
    """`x W' + bias + sum of scale * h B'`, (..., d_out); or why the operators do not compute it."""
    if reason := product_unsuitable(x, weight, layout, rest[-1]) or _unready(layout, x, *weight):
        return reason
    _check(weight, layout)
    return loaded().adapted_linear_core(x, weight, layout, *rest)


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
    """`dy W`, (..., d_in); or why the operators do not compute it."""
    if reason := input_gradient_unsuitable(layout) or _unready(layout, dy, *weight):
        return reason
    _check(weight, layout)
    return loaded().linear_input_gradient(dy, weight, layout)


def _unready(layout: str, *tensors: Tensor) -> str | None:
    """Why the operators cannot be called with tensors, or None."""
    if serving(*tensors) is None:
        return kernels().refusal() or "a tensor of another class"
    if layout != "dense" and loaded_with_nf4() is None:
        return nf4.kernels().refusal()
    return None


def _check(weight: Sequence[Tensor], layout: str) -> None:
    """Refuse tensors that are not what the layout says."""
    if layout != "dense":
        stored: Any = storage.layout(layout)
        codes, absmax, *nested = weight
        check_stored(codes, absmax, nested, math.prod(stored.shape), stored.blocksize)
