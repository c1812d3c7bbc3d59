"""report: what a model holds and what training it takes, in parameters, bytes and floating-point operations.

Adapters, gradients and optimizer state are closed forms; what a training step saves for its backward, and the memory
at its peak, are counted from graphs: those that were captured, or those of a step that is counted for the occasion
(`rewrite.estimate`).  Nothing is measured on a device.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.codegen.files import write
from rewrite.errors import ResolveError, RewriteError
from rewrite.estimate import Estimate, Estimator, batch_of
from rewrite.explain import base_rows, graph_heading
from rewrite.passes.record import GraphRecord, summarise
from rewrite.progress import waiting
from rewrite.runtime.attach import attachment
from rewrite.runtime.captures import records_of
from rewrite.runtime.holdings import Held, holdings
from rewrite.runtime.scaling import Counts
from rewrite.spec import Spec
from rewrite.structure.inputs import Inputs
from rewrite.table import flops, share, size, table

_LARGEST = 10  # groups of saved storages that a table shows
_FULL = "full fine-tuning"
_LORA = ("lora(r=8)@linear-head", "lora(r=8)@linear")
"""Plain LoRA, to stand beside other specs: the first that a model has sites for."""


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
    """The graphs of a training step.

    `saved` (by the min-cut partition), its bytes by the `default` partition, which are those of an eager step, the
    operations, and `peak`, the most bytes beside parameters and optimizer state over the schedule of the step, are
    None where they were not counted, with the reason.
    """

    heading: str
    saved: tuple[Saved, ...] | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    default_saved_bytes: int | None = None
    peak_bytes: int | None = None
    uncounted: str = ""

    @property
    def saved_bytes(self) -> int:
        return sum(s.bytes for s in self.saved or ())

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return (self.forward_flops or 0) + (self.backward_flops or 0)


@dataclass(frozen=True)
class Report:
    """Parameters, bytes and operations of training a model; prints as tables.

    `beside` are reports of the same step by other means, to compare with.
    """

    model: str
    spec: str
    parameters: int
    trainable: int
    memory: tuple[Line, ...]
    graphs: tuple[Graph, ...]
    beside: tuple[Report, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Everything in `memory`, and the largest of what a training graph saves for its backward."""
        return sum(line.bytes for line in self.memory) + max((g.saved_bytes for g in self.graphs), default=0)

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes at any time of a step: parameters, optimizer state and the peak of its graphs."""
        peaks = [g.peak_bytes for g in self.graphs if g.peak_bytes is not None]
        held = sum(line.bytes for line in self.memory if line.what != "gradients")  # the graphs make those
        return held + max(peaks) if peaks else None

    def __str__(self) -> str:
        head = f"{self.model}: {self.spec or 'nothing is attached'}"
        count = f"{self.trainable:,} trainable ({share(self.trainable, self.parameters)} of {self.parameters:,})"
        rows = [("memory", "dtype", "parameters", "bytes")]
        rows += [(m.what, m.dtype, f"{m.parameters:,}" if m.parameters else "", size(m.bytes)) for m in self.memory]
        if any(g.saved is not None for g in self.graphs):
            rows.append(("saved for backward", "", "", size(max(g.saved_bytes for g in self.graphs))))
        rows.append(("total", "", "", size(self.bytes)))
        if self.peak_bytes is not None:
            rows.append(("peak, operator by operator", "", "", size(self.peak_bytes)))
        parts = ["\n".join([head, count]), "\n".join(table(rows, right={2, 3}))]
        parts += ["\n".join(_graph_lines(g)) for g in self.graphs]
        if self.beside:
            parts.append("\n".join(_comparison([self, *self.beside])))
        if self.notes:
            parts.append("\n".join(f"note: {note}" for note in self.notes))
        return "\n\n".join(parts)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; bytes and operations as plain numbers."""
        graphs = [asdict(g) | {"saved_bytes": g.saved_bytes if g.saved is not None else None} for g in self.graphs]
        beside = [one.to_dict() for one in self.beside]
        return asdict(self) | {
            "bytes": self.bytes, "peak_bytes": self.peak_bytes, "graphs": graphs, "beside": beside
        }  # fmt: skip

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_png(self, path: str | os.PathLike[str]) -> Path:
        """Draw the memory of a training step as a stacked bar, those beside it below; returns where the picture is."""
        from rewrite.bars import picture

        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, picture(self.model, [(one.spec, one.parts()) for one in (self, *self.beside)]))
        except OSError as error:
            raise RewriteError(f"cannot write the picture to {file}: {error}") from error
        return file

    def parts(self) -> dict[str, int]:
        """What `bytes` is the sum of, by name."""
        found = {line.what: line.bytes for line in self.memory}
        saved = max((g.saved_bytes for g in self.graphs), default=0)
        return found | {"saved for backward": saved} if saved else found


def report(
    model: nn.Module,
    spec: str | Spec | None = None,
    *,
    tokens: int | None = None,
    batch: int = 1,
    inputs: Inputs | Mapping[str, Any] | Sequence[Any] | None = None,
) -> Report:
    """What `model` holds and what a training step of it takes.

    With `tokens` (a row, `batch` rows) or `inputs`, a batch of those sizes, a step is counted under fake tensors: of a
    bare model with `spec` attached to a copy, or of the model as it is, with full fine-tuning and plain LoRA beside
    it.  The model stays as it is, may be of any size and on the meta device.  Without them, what is known from the
    graphs that were captured.  Units: bytes; floating-point operations, 2 per multiply-add.  The optimizer is taken to
    be AdamW (Loshchilov & Hutter 2019).

    Raises `RewriteError` where a model cannot run without numbers, `SpecError` as `rewrite.plan`.

    Example: `print(rewrite.report(model, "lora(r=8)@attn.q,v + nf4(base)", tokens=512))`
    """
    if tokens is None and inputs is None:
        if spec is not None:
            raise RewriteError("a spec is counted on a batch: say how many tokens=..., or pass inputs={...}")
        return _as_captured(model)
    if spec is not None and (state := attachment(model)) is not None:
        raise RewriteError(
            f"this model has '{state.spec}' attached: leave the spec out, or rewrite.remove(model) first"
        )
    given = Inputs.of(inputs) if inputs is not None else batch_of(model, tokens or 1, batch)
    name = type(model).__name__
    with waiting("count a training step"):
        estimator = Estimator(model, given)
        estimate = estimator.estimate(spec) if spec is not None else estimator.as_it_is()
        beside = [counted_report(name, estimator.full(), str(given), _FULL)]
        if (lora := _lora(estimator, estimate.spec)) is not None:
            beside.append(counted_report(name, lora, str(given)))
    return counted_report(name, estimate, str(given), beside=beside)


def counted_report(
    model: str, estimate: Estimate, batch: str, label: str = "", beside: Sequence[Report] = ()
) -> Report:
    """The report of a step that was counted on a batch of these sizes."""
    held, counts = estimate.held, estimate.counts
    return Report(
        model,
        label or estimate.spec,
        sum(h.parameters for h in held if h.base),
        sum(h.parameters for h in held if h.trains),
        tuple(_memory(held)),
        (_counted(counts, batch),),
        tuple(beside),
        estimate.notes,
    )


def _lora(estimator: Estimator, counted: str) -> Estimate | None:
    """Plain LoRA, unless it is what was counted already."""
    for spec in _LORA:
        if spec == counted:
            return None
        try:
            return estimator.estimate(spec)
        except ResolveError:  # a model without such sites
            continue
    return None


def _as_captured(model: nn.Module) -> Report:
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


def _counted(counts: Counts, batch: str) -> Graph:
    if not counts.graphs:
        return Graph(f"one step, {batch}", uncounted="nothing in it needs a gradient")
    graphs = "" if counts.graphs == 1 else f", in {counts.graphs:.0f} graphs"
    saved = [
        Saved(where or "(model)", shape, dtype, round(count), round(total))
        for (where, shape, dtype), (count, total) in counts.saved.items()
    ]
    return Graph(
        f"one step, {batch}{graphs}",
        tuple(sorted(saved, key=lambda s: -s.bytes)),
        round(counts.forward_flops),
        round(counts.backward_flops),
        round(counts.default_saved),
        round(counts.peak),
    )


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
    eager = f", {size(graph.default_saved_bytes)} without compiling" if graph.default_saved_bytes is not None else ""
    lines = [graph.heading, f"{work}; saved for backward: {size(graph.saved_bytes)} in {count:,} storages{eager}"]
    rows = [("saved at", "shape", "dtype", "count", "bytes")]
    rows += [(s.where, _shape(s.shape), s.dtype, f"{s.count:,}", size(s.bytes)) for s in graph.saved[:_LARGEST]]
    if rest := graph.saved[_LARGEST:]:
        rows.append(("the rest", "", "", f"{sum(s.count for s in rest):,}", size(sum(s.bytes for s in rest))))
    return [*lines, "", *table(rows, right={3, 4})]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _comparison(reports: Sequence[Report]) -> list[str]:
    """One row a report: what is held, what a step adds to it, and what it computes."""
    rows = [("", "trainable", "weights", "optimizer", "gradients", "saved", "peak", "joint")]
    for one in reports:
        parts, graph = one.parts(), one.graphs[0]
        weights = sum(line.bytes for line in one.memory if line.parameters or line.what.startswith("base"))
        rows.append((
            one.spec or "as it is", f"{one.trainable:,}", size(weights), size(parts.get("AdamW state", 0)),
            size(parts.get("gradients", 0)), size(graph.saved_bytes), size(one.peak_bytes or 0), flops(graph.flops),
        ))  # fmt: skip
    return table(rows, right=set(range(1, 8)))
