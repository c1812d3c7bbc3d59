"""Memory that an operator takes while it runs, beyond what it returns: fused operators say so themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_formulas: dict[Any, Callable[..., int]] = {}


def register_workspace(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Enter a formula for an operator packet: its arguments, tensors by shape and dtype alone -> bytes.

    >>> @register_workspace(torch.ops.rewrite.adapted_linear_core)          # doctest: +SKIP
    ... def decoded(x, weight, layout, *rest): ...
    """

    def enter(formula: Callable[..., int]) -> Callable[..., int]:
        _formulas[op] = formula
        return formula

    return enter


def workspace(target: Any, *args: Any, **kwargs: Any) -> int:
    """Bytes that a call of `target` takes while it runs; 0 for an operator that does not say."""
    formula = _formulas.get(getattr(target, "_overloadpacket", target))
    return formula(*args, **kwargs) if formula is not None else 0
