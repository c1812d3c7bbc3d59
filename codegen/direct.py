"""How graphs compiled for a CPU call our operators: those in C++ where they take the call, functions in Python else.

Called by their own names, operators that are written in Python go from a generated source through the dispatcher, into
Python again.  Beside products that stream through the caches, so much code is cold whenever it runs: in a training step
of a small model on two cores it was a few percent of the time.  And an operator that allocates its result gets fresh
pages, whose first writes are slow; large results go into buffers that Inductor hands out, and uses again.

`lowering.py` tells Inductor; sources that it generates import from here what they call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rewrite.codegen import branches, columns, dropout, ops, row_norms
from rewrite.codegen.cpu import operators

PYTHON: dict[str, Callable[..., Any]] = {
    "adapted_linear_core": ops.routed_core,
    "linear_input_gradient": ops.routed_input_gradient,
    "low_rank_gradients": branches.low_rank_gradients,
    "sum_of_products": branches.sum_of_products,
    "factor_gradient": branches.factor_gradient,
    "column_sums": columns.column_sums,
    "scaled_sums": columns.scaled_sums,
    "scaled_sums_": columns.scaled_sums_,
    "dropout": dropout.dropped,
    "dropped_linear_core": dropout.linear,
    "dropped_linear_gradients": dropout.linear_gradients,
    "adapted_row_norms": row_norms.adapted_row_norms,
}
"""By the name of the operator, what it is on a CPU."""
_NEVER = {"factor_gradient"}  # in C++
_INTO = {"adapted_linear_core", "linear_input_gradient", "sum_of_products", "dropout"}
"""Those in C++ that can write into a buffer."""
OVER = {"scaled_sums"}
"""Those whose first result can take the place of their first argument: then they are `<name>_`."""


@functools.cache
def functions(of_nf4: bool = False) -> dict[str, Callable[..., Any]]:
    """What generated sources call: by the name of the operator, `<name> in C++` for calls that C++ takes.

    `<name> into` takes `out=` besides, a buffer for the result.  Those for weights in NF4 need more to be compiled.
    """
    found, table = operators.loaded_with_nf4() if of_nf4 else operators.loaded(), dict(PYTHON)
    for name, function in PYTHON.items():
        if name not in _NEVER:
            table[f"{name} in C++"] = function if found is None else getattr(found, name).default
        if name in _INTO:
            table[f"{name} into"] = _copied(function) if found is None else getattr(found, name).out
    return table


def _copied(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, out: out.copy_(function(*args))


def entry_of(name: str, args: Sequence[Any]) -> str:
    """Which of the `functions` an operator is for the arguments of a node of a graph."""
    values = fx.map_arg(args, lambda node: node.meta["val"])
    if name == "adapted_linear_core":
        x, weight, layout, *_, skip = values  # type: ignore[misc]
        takes = operators.product_unsuitable(x, weight, layout, skip) is None
    elif name == "linear_input_gradient":
        takes = operators.input_gradient_unsuitable(values[2]) is None  # type: ignore[arg-type]
    elif name == "adapted_row_norms":
        weight, layout, A, B, _ = values  # type: ignore[misc]
        takes = operators.norms_serve(weight, layout, A, B)
    else:
        takes = name not in _NEVER
    return name if not takes else f"{name} into" if name in _INTO else f"{name} in C++"
