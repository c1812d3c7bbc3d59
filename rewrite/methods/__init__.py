"""One file per method.  A file here that defines a `Method` dataclass is found by itself: no list to edit."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from rewrite.method import Method


@functools.cache
def registry() -> Mapping[str, type[Method]]:
    """Every method by its spec name, sorted.

    >>> "lora" in registry()
    True
    """
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(loaded).values():
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == loaded.__name__:
                found[value.name] = value
    return MappingProxyType(dict(sorted(found.items())))
