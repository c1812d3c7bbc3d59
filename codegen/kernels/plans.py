"""Decisions that are made once: what is planned for tensors depends on how they lie in memory, not on their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
KEPT = 4096
"""Plans of one function that are kept; a process that meets more layouts (lengths of prompts) starts over."""


def by_layout(plan: Callable[..., T]) -> Callable[..., T]:
    """`plan`, called once for each layout of its tensors: their shapes, strides, dtypes and devices.

    >>> import torch
    >>> @by_layout
    ... def rows(x, scale):
    ...     print("planned")
    ...     return x.shape[0]
    >>> rows(torch.ones(2, 3), 1.0), rows(torch.zeros(2, 3), 1.0)
    planned
    (2, 2)

    `plan` reads nothing else of its tensors (no values, no addresses); everything else that it depends on is an
    argument or fixed in a process; its result keeps no tensor.  What is not a tensor, nor a list of some, is hashed.
    """
    found: dict[Hashable, T] = {}

    @functools.wraps(plan)
    def planned(*arguments: Any) -> T:
        key = _layout(arguments)
        try:
            return found[key]
        except KeyError:
            made = plan(*arguments)
        if len(found) >= KEPT:
            found.clear()
        found[key] = made
        return made

    _FORGETTING.append(found.clear)
    return planned


def _layout(values: Sequence[Any]) -> Hashable:
    return tuple(
        [  # at every call: a list is faster than a generator
            (v.shape, v.stride(), v.dtype, v.device)
            if isinstance(v, Tensor)
            else _layout(v)
            if isinstance(v, (list, tuple))
            else v
            for v in values
        ]
    )


_FORGETTING: list[Callable[[], None]] = []


def kept(plan: Callable[..., T]) -> Callable[..., T]:
    """`plan`, called once for each of its arguments, which are hashed: devices, sizes, kernels."""
    cached = functools.lru_cache(maxsize=KEPT)(plan)
    _FORGETTING.append(cached.cache_clear)
    return cached


def forget() -> None:
    """Plan everything anew: for tests that change what plans take for fixed."""
    for clear in _FORGETTING:
        clear()
