"""Graphs as readable Python programs with provenance, and the files that `REWRITE_DUMP=dir` asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rewrite.passes.record import GraphRecord
from rewrite.passes.rule import line

_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "bfloat16": "bf16",
    "float16": "f16",
    "int64": "i64",
    "uint8": "u8",
}


def program(graph: fx.Graph, heading: str) -> str:
    """The graph as a Python program: one line per node with its type, its site, and the rule that made it.

    It is for reading and for diffs: no user counts, nothing that changes when an unrelated line does.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    out = [f"# {heading}", "def forward("]
    out += [f"    {n.name},{_type(n)}" for n in inputs]
    out.append("):")
    site = None
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        here = node.meta.get("site") or ""
        if here != site and node.op != "output":
            site = here
            out.append(f"    # {here or '(model)'}")
        made = f"  <- {node.meta['rule']}" if "rule" in node.meta else ""
        kind = _type(node)
        out.append(f"    {line(node)}{kind or ('  #' if made else '')}{made}")
    return "\n".join(out) + "\n"


def _type(node: fx.Node) -> str:
    value: Any = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    return f"  # {_SHORT.get(dtype, dtype)}[{', '.join(map(str, value.shape))}]"


def dump(record: GraphRecord, number: int, name: str, text: str) -> None:
    """Write one program to `$REWRITE_DUMP/<graph>/<number>_<pass>.py`, when that variable is set."""
    folder = os.environ.get("REWRITE_DUMP")
    if not folder:
        return
    place = Path(folder) / record.title
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{number}_{name}.py").write_text(text, encoding="utf-8")
