"""Operators without their derivative, for graphs that autograd has already been through.

A derivative that Python registers is one more Python function around its operator: some 10 us of every call, in which
a compiled graph has nothing to compute.  So an operator has a second overload, `below`, that is the same without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BELOW: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
"""The overload without a derivative, by the operator."""


def define_below(
    lib: torch.library.Library, op: torch._ops.OpOverload, fake: Callable[..., Any], **kernels: Callable[..., Any]
) -> None:
    """Define `<op>.below` with the same schema, fake and kernels; `kernels` by dispatch key.

    Example: `define_below(_lib, torch.ops.rewrite.dropout.default, _fake, CompositeExplicitAutograd=_dropout)`
    """
    qualified = op._schema.name
    name = qualified.removeprefix("rewrite::")
    lib.define(f"{name}.below{str(op._schema).removeprefix(qualified)}")
    for key, kernel in kernels.items():
        lib.impl(f"{name}.below", kernel, key)
    torch.library.register_fake(f"{qualified}.below", fake, lib=lib)
    BELOW[op] = getattr(torch.ops.rewrite, name).below
