"""Generated sources as files, each with what its compilation took: `REWRITE_DUMP=dir` writes `dir/kernels/*.py`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.codegen import files

if TYPE_CHECKING:
    from rewrite.codegen.kernels.kernel import Config, Kernel

_written: set[tuple[Any, ...]] = set()


def kernel(kernel: Kernel, config: Config, compiled: Any) -> None:
    """Write one source, headed by its configuration, registers, spills and shared memory."""
    folder = Path(os.environ["REWRITE_DUMP"]) / "kernels"
    key = (folder, kernel, config)
    if key in _written:
        return
    _written.add(key)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{kernel!r}{config}".encode()).hexdigest()[:8]
    heading = f"# {kernel!r}\n# {config}\n# {_resources(compiled)}\n\n"
    files.write(folder / f"{kernel.name}_{digest}.py", (heading + kernel.source).encode())


def _resources(compiled: Any) -> str:
    if not hasattr(compiled, "n_regs"):
        return "interpreted: no registers, no shared memory"
    return (
        f"{compiled.n_regs} registers, {compiled.n_spills} spills, {compiled.metadata.shared:,} bytes of shared memory"
    )
