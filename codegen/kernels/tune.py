"""Autotuning: configurations and routes timed on the device at hand, once for each size, when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from rewrite.codegen.kernels import plans

T = TypeVar("T")
_found: dict[Hashable, Any] = {}
_asked = False


def ask() -> None:
    """Time kernels in this process from now on: a graph was compiled with `mode="max-autotune"`.

    Inductor's configuration says so while it compiles; operators are timed when they first run.
    """
    global _asked
    _asked = True


def wanted() -> bool:
    """Whether kernels are timed before they are chosen: `mode="max-autotune"`, or `REWRITE_AUTOTUNE=1`."""
    said = _said()
    return said != "0" if said else _asked


@plans.kept
def _said() -> str | None:
    return os.environ.get("REWRITE_AUTOTUNE")  # once: at every launch it would take a tenth of the call


def fastest(key: Hashable, choices: Sequence[T], run: Callable[[T], object], default: T) -> T:
    """The choice that ran fastest on the arguments at hand, timed once for each key; the default during a capture."""
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed in there
            return default
        _found[key] = min(choices, key=lambda choice: _milliseconds(lambda: run(choice)))
    return _found[key]


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        found: Any = do_bench(run, warmup=5, rep=20, return_mode="median")
        return float(found)
    except (OutOfResources, PTXASError, CompilationError, RuntimeError):
        return float("inf")
