"""Floating-point operations of operators that compute several results at once: of each result, and so of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

_formulas: dict[Any, Callable[..., Sequence[int]]] = {}


def register_flops_of_results(op: Any) -> Callable[[Callable[..., Sequence[int]]], Callable[..., Sequence[int]]]:
    """Enter a formula for an operator packet: its arguments, tensors by their shapes -> FLOPs of each result.

    PyTorch's counter is told their sum.  A gradient that is one result of several costs its own.
    """

    def enter(formula: Callable[..., Sequence[int]]) -> Callable[..., Sequence[int]]:
        _formulas[op] = functools.partial(_of_tensors, formula)
        register_flop_formula(op)(lambda *args, out_shape=None, **kwargs: sum(formula(*args, **kwargs)))
        return formula

    return enter


def _of_tensors(formula: Callable[..., Sequence[int]], *args: Any, **kwargs: Any) -> Sequence[int]:
    args, kwargs = tree_map(lambda v: v.shape if isinstance(v, torch.Tensor) else v, (args, kwargs))
    return formula(*args, **kwargs)


def flops_of_results(target: Any) -> Callable[..., Sequence[int]] | None:
    """The formula of an operator, of tensors, for each of its results, None for one that has no such formula."""
    return _formulas.get(getattr(target, "_overloadpacket", target))
