"""Our operators on a CPU in C++ (`operators.cpp`), and the route of dense adapted layers.

Called by name, they go through the dispatcher once and through no Python.  A call from Python costs little while it is
hot; between products that stream through the caches it is cold whenever it runs, and took 100 to 250 us each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rewrite.codegen.cpu.build import Build, build, instruction_sets, namespace
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


def serving(*tensors: Tensor) -> Any:
    """The namespace of the operators for tensors that they take; None for others, and where it cannot be had."""
    return loaded() if is_eager(*tensors) and all(t.is_cpu for t in tensors) else None


def norms_serve(weight: Sequence[Any], layout: str, A: Any, B: Any) -> bool:
    """Whether `adapted_row_norms` takes these: tensors, or what else has a dtype."""
    return layout == "dense" and all(t.dtype == torch.float32 for t in (weight[0], A, B))


def product_unsuitable(x: Any, weight: Sequence[Any], layout: str, skip: Sequence[int]) -> str | None:
    """Why `adapted_linear_core` does not take these, tensors or what else has a dtype, or None."""
    if layout != "dense":
        return "a stored weight"
    if skip:
        return "columns that are left out"
    return None if weight[0].dtype == x.dtype else f"a weight of {weight[0].dtype} for {x.dtype}"


def product(x: Tensor, weight: Sequence[Tensor], layout: str, *rest: Any) -> Tensor | str:
    """`x W' + bias + sum of scale * h B'`, (..., d_out); or why the operators do not compute it."""
    if reason := product_unsuitable(x, weight, layout, rest[-1]):
        return reason
    if (cpu := serving(x, *weight)) is None:
        return kernels().refusal() or "a tensor of another class"
    return cpu.adapted_linear_core(x, weight, layout, *rest)


def input_gradient(dy: Tensor, weight: Sequence[Tensor], layout: str) -> Tensor | str:
    """Why the operators do not compute this gradient."""
    return "one product of PyTorch"
