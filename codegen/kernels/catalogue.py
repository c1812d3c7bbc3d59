"""All kernels: every module of this folder has `EXAMPLES`, structures that the tests compile ahead of time."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator

import rewrite.codegen.kernels as package
from rewrite.codegen.kernels.kernel import Config, Kernel
from rewrite.codegen.kernels.target import Target


@functools.cache
def examples() -> tuple[Kernel, ...]:
    """Structures of all kernels, of shapes and dtypes that models have."""
    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return tuple(kernel for module in modules for kernel in getattr(module, "EXAMPLES", ()))


def launches(target: Target) -> Iterator[tuple[Kernel, Config]]:
    """Every example with every configuration of its space that is legal on a target."""
    for kernel in examples():
        for config in kernel.configs(target):
            yield kernel, config
