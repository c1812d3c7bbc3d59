"""Autotuning: the configurations of a kernel timed on the device at hand, once for each size, when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rewrite.codegen.kernels.kernel import Config, Kernel

_found: dict[tuple[Any, ...], Any] = {}


def wanted() -> bool:
    """Whether kernels are timed before they are chosen: `mode="max-autotune"`, or `REWRITE_AUTOTUNE=1`."""
    if os.environ.get("REWRITE_AUTOTUNE"):
        return os.environ["REWRITE_AUTOTUNE"] != "0"
    import torch._inductor.config as config

    return bool(config.max_autotune)


def fastest(
    kernel: Kernel,
    device: torch.device,
    sizes: Sequence[int],
    configs: Sequence[Config],
    run: Callable[[Config], None],
) -> Config:
    """The configuration that ran fastest on the arguments at hand; sizes share a choice up to a factor of two."""
    key = (kernel, device, tuple(size.bit_length() for size in sizes))
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed in there
            return kernel.choose(configs)
        _found[key] = min(configs, key=lambda config: _milliseconds(run, config))
    return _found[key]


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        found: Any = do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
        return float(found)
    except (OutOfResources, PTXASError, CompilationError, RuntimeError):
        return float("inf")
