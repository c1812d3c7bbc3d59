"""report: what a model holds and what training it takes, in parameters, bytes and floating-point operations.

Adapters, gradients and optimizer state are closed forms; what a training step saves for its backward is counted
from the graphs that were captured.  Nothing runs, and nothing is measured on a device.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.explain import base_rows, graph_heading
from rewrite.passes.record import GraphRecord, summarise
from rewrite.runtime.attach import attachment
from rewrite.runtime.captures import records_of
from rewrite.runtime.files import write
from rewrite.runtime.holdings import Held, holdings
from rewrite.table import flops, share, size, table

_LARGEST = 10  # groups of saved storages that a table shows


@dataclass(frozen=True)
class Line:
    """One kind of tensor in memory: parameters that it stands for, and bytes."""

    what: str
    dtype: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Saved:
    """Storages that differ in nothing but the layer they belong to, kept from the forward for the backward."""

    where: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Graph:
    """A captured training graph; `saved` and the operations are None where nothing was counted, with the reason."""

    heading: str
    saved: tuple[Saved, ...] | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    uncounted: str = ""

    @property
    def saved_bytes(self) -> int:
        return sum(s.bytes for s in self.saved or ())


@dataclass(frozen=True)
class Report:
    """Parameters, bytes and operations of training a model as it is now; prints as tables."""

    model: str
    spec: str
    parameters: int
    trainable: int
    memory: tuple[Line, ...]
    graphs: tuple[Graph, ...]

    @property
    def bytes(self) -> int:
        """Everything in `memory`, and the largest of what a training graph saves for its backward."""
        return sum(line.bytes for line in self.memory) + max((g.saved_bytes for g in self.graphs), default=0)

    def __str__(self) -> str:
        head = f"{self.model}: {self.spec or 'nothing is attached'}"
        count = f"{self.trainable:,} trainable ({share(self.trainable, self.parameters)} of {self.parameters:,})"
        rows = [("memory", "dtype", "parameters", "bytes")]
        rows += [(m.what, m.dtype, f"{m.parameters:,}" if m.parameters else "", size(m.bytes)) for m in self.memory]
        if any(g.saved is not None for g in self.graphs):
            rows.append(("saved for backward", "", "", size(max(g.saved_bytes for g in self.graphs))))
        rows.append(("total", "", "", size(self.bytes)))
        parts = ["\n".join([head, count]), "\n".join(table(rows, right={2, 3}))]
        return "\n\n".join([*parts, *("\n".join(_graph_lines(g)) for g in self.graphs)])

    __repr__ = __str__

    def to_json(self) -> str:
        """Everything, as JSON; bytes and operations as plain numbers."""
        graphs = [asdict(g) | {"saved_bytes": g.saved_bytes if g.saved is not None else None} for g in self.graphs]
        return json.dumps(asdict(self) | {"bytes": self.bytes, "graphs": graphs}, indent=2)

    def to_png(self, path: str | os.PathLike[str]) -> Path:
        """Draw the memory of a training step as one stacked bar; returns where the picture is."""
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, _picture(self))
        except OSError as error:
            raise RewriteError(f"cannot write the picture to {file}: {error}") from error
        return file


def report(model: nn.Module) -> Report:
    """What `model` holds and what a training step of it takes, from what is known without running it.

    Example: `print(rewrite.report(model))`.  Units: bytes; floating-point operations, 2 per multiply-add.  The
    optimizer is taken to be AdamW (Loshchilov & Hutter 2019).
    """
    state, held = attachment(model), holdings(model)
    return Report(
        type(model).__name__,
        state.spec if state else "",
        sum(h.parameters for h in held if h.base),
        sum(h.parameters for h in held if h.trains),
        tuple(_memory(held)),
        tuple(_graph(r, state.backend if state else None) for r in records_of(model) if r.training),
    )


def _memory(held: Sequence[Held]) -> Iterable[Line]:
    for storage, dtypes, parameters, count in base_rows(held):
        yield Line(f"base, {storage}", dtypes, parameters, count)
    adapters = [h for h in held if not h.base]
    trained = [h for h in held if h.trains]
    if adapters:
        yield Line("adapters", _dtypes(adapters), sum(h.parameters for h in adapters), sum(h.bytes for h in adapters))
    if trained:
        yield Line("gradients", _dtypes(trained), 0, sum(h.bytes for h in trained))
        # Two moments like the parameter, and a float32 step count for each tensor.
        step = torch.float32.itemsize * len(trained)
        yield Line("AdamW state", _dtypes(trained), 0, 2 * sum(h.bytes for h in trained) + step)


def _dtypes(held: Iterable[Held]) -> str:
    return ", ".join(dict.fromkeys(str(h.dtype).removeprefix("torch.") for h in held))


def _graph(record: GraphRecord, backend: str | None) -> Graph:
    counts = record.counts
    if "saved" not in counts:
        eager = "backend eager runs the graph without partitioning it"
        cached = "its compiled code came from the compile cache, or no input of it needs a gradient"
        return Graph(graph_heading(record), uncounted=eager if backend == "eager" else cached)
    saved = tuple(_grouped(counts["saved"]))
    return Graph(graph_heading(record), saved, counts["forward_flops"], counts["backward_flops"])


def _grouped(saved: Iterable[dict[str, Any]]) -> list[Saved]:
    """Storages grouped over layers, the largest group first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in saved:
        leaf = "".join("#" if c.isdigit() else c for c in one["site"])
        groups[(leaf, tuple(one["shape"]), one["dtype"])].append(one)
    found = [
        Saved(summarise([o["site"] for o in ones]) or "(model)", shape, dtype, len(ones), sum(o["bytes"] for o in ones))
        for (_, shape, dtype), ones in groups.items()
    ]
    return sorted(found, key=lambda s: -s.bytes)


def _graph_lines(graph: Graph) -> list[str]:
    if graph.saved is None or graph.forward_flops is None or graph.backward_flops is None:
        return [graph.heading, f"  not counted: {graph.uncounted}"]
    work = f"forward {flops(graph.forward_flops)}, backward {flops(graph.backward_flops)}"
    count = sum(s.count for s in graph.saved)
    lines = [graph.heading, f"{work}; saved for backward: {size(graph.saved_bytes)} in {count:,} storages"]
    rows = [("saved at", "shape", "dtype", "count", "bytes")]
    rows += [(s.where, _shape(s.shape), s.dtype, f"{s.count:,}", size(s.bytes)) for s in graph.saved[:_LARGEST]]
    if rest := graph.saved[_LARGEST:]:
        rows.append(("the rest", "", "", f"{sum(s.count for s in rest):,}", size(sum(s.bytes for s in rest))))
    return [*lines, "", *table(rows, right={3, 4})]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _picture(report: Report) -> bytes:
    # Imported here: matplotlib takes half a second to load.
    import io

    from matplotlib.figure import Figure

    parts = [(line.what, line.bytes) for line in report.memory]
    if saved := max((g.saved_bytes for g in report.graphs), default=0):
        parts.append(("saved for backward", saved))
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = ["#3d6da8", "#86a9d4", "#b9cde6", "#b3590b", "#e39a55", "#f1c79c", "#0d7a63", "#6db9a6"]
    start, scale = 0.0, max(report.bytes, 1)
    for (name, count), colour in zip(parts, _cycle(colours, len(parts)), strict=True):
        axes.barh(0, count / scale, left=start, color=colour, edgecolor="white", label=f"{name}  {size(count)}")
        start += count / scale
    axes.set(xlim=(0, 1), yticks=[], xlabel=f"share of {size(report.bytes)}", title=f"{report.model}: {report.spec}")
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
