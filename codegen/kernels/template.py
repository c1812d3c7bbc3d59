"""The template language: jinja2 over a kernel's structure, `%%` opening its lines, to a standalone Triton source."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from rewrite.codegen import cache, files


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        line_statement_prefix="%%",
        line_comment_prefix="%#",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, structure: Mapping[str, Any]) -> str:
    """The source of one kernel: `templates/<template>.py.j2` with the names of its structure."""
    lines = _environment().get_template(f"{template}.py.j2").render(**structure).splitlines()
    kept: list[str] = []
    for line in lines:  # a statement that was left out leaves no second empty line
        if line.strip() or (kept and kept[-1].strip()):
            kept.append(line.rstrip())
    return "\n".join(kept).replace("\n@triton.jit", "\n\n@triton.jit").rstrip() + "\n"


def load(name: str, source: str) -> ModuleType:
    """Import a generated source, from a file: Triton and tracebacks read it there."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    unique = f"rewrite_kernel_{name}_{digest}"
    if unique in sys.modules:
        return sys.modules[unique]
    path = cache.folder("kernels") / f"{name}_{digest}.py"
    if not path.exists():
        files.write(path, source.encode())
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module
