"""explain: everything that was done to a model, and everything that was not, as text.

It reads the attachment and the records of captured graphs; it never compiles, runs or changes anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from rewrite.bind import Bound, bind
from rewrite.codegen.cpu import operators
from rewrite.codegen.routes import of_storage
from rewrite.methods import registry
from rewrite.parser import parse
from rewrite.passes.record import GraphRecord, PassRecord, group, summarise
from rewrite.planning import placement_table
from rewrite.runtime.attach import Attachment, CompiledCallBase, attachment
from rewrite.runtime.captures import records_of
from rewrite.runtime.graft import Graft
from rewrite.runtime.holdings import Held, holdings
from rewrite.runtime.merge import merge_report
from rewrite.runtime.regimes import trained
from rewrite.runtime.switching import in_use
from rewrite.table import duration, share, size, table

FUSED, PLAIN = ("adapted_linear", "scaled_branch"), "plain operators"
"""Operators that compute adapted modules, in the order in which they are applied."""


class Explanation(str):
    """Text that shows as it is at a prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(model: nn.Module) -> Explanation:
    """What is attached to `model`, what the passes did to each captured graph, and what fell back, with reasons.

    Works before the first call, on a merged model and on a plain one.

    Example: `print(rewrite.explain(model))`
    """
    state, held = attachment(model), holdings(model)
    if state is None:
        return Explanation(_without(model, held))
    records, bound = records_of(model), bind(parse(state.spec), registry())
    parts = [
        _head(model, state, held),
        _placements(state),
        _base(held),
        _start(state, bound)
        + _kernels(state, bound, held)
        + _routes(state)
        + _regimes(model, state)
        + _use(model, state),
    ]
    parts.append(_calls(model, state, records))
    parts += _graphs(records, state)
    parts += [_missing(records, state), _notes(state)]
    return Explanation("\n\n".join("\n".join(part) for part in parts if part))


def _without(model: nn.Module, held: Sequence[Held]) -> str:
    report = merge_report(model)
    what = str(report) if report else "nothing is attached"
    return f"{type(model).__name__}: {what}\n{sum(h.parameters for h in held):,} parameters"


def _head(model: nn.Module, state: Attachment, held: Sequence[Held]) -> list[str]:
    total = sum(h.parameters for h in held if h.base)
    works = sum(h.parameters for h in held if h.trains)
    count = f"{len(state.grafts):,} placements, {works:,} trainable ({share(works, total)} of {total:,})"
    return [f"{type(model).__name__}: {state.spec}", count]


def _placements(state: Attachment) -> list[str]:
    return placement_table(
        (graft.label, row["role"], row["site"], tuple(row["shape"]), row["trainable"])
        for graft, row in zip(state.grafts, state.sites, strict=True)
    )


def base_rows(held: Iterable[Held]) -> list[tuple[str, str, int, int]]:
    """(storage, dtypes, parameters, bytes) of the base, one row per way of storing."""
    groups: dict[tuple[str, str], list[Held]] = defaultdict(list)
    for h in held:
        if h.base:  # codes and scales of one format are one way of storing; plain tensors of two dtypes are two
            groups[(h.storage, str(h.dtype) if h.storage in ("dense", "buffer") else "")].append(h)
    return [
        (
            storage,
            ", ".join(dict.fromkeys(str(h.dtype).removeprefix("torch.") for h in group)),
            sum(h.parameters for h in group),
            sum(h.bytes for h in group),
        )
        for (storage, _), group in groups.items()
    ]


def _base(held: Sequence[Held]) -> list[str]:
    rows = [("base", "dtype", "parameters", "bits each", "bytes")]
    for storage, dtypes, parameters, count in base_rows(held):
        bits = f"{count * 8 / parameters:.3g}" if parameters else "-"
        rows.append((storage, dtypes, f"{parameters:,}", bits, size(count)))
    return table(rows, right={2, 3, 4})


def _start(state: Attachment, bound: Sequence[Bound]) -> list[str]:
    """What the adapters do to the function before the first step, and what is not exact."""
    known = registry()
    moved = sorted({r["method"] for r in state.sites if r["method"] in known and not known[r["method"]].identity})
    text = f"{', '.join(moved)} changes the function" if moved else "the adapters change the function by nothing"
    stored = dict.fromkeys(g.label for g in state.grafts if g.where == "storage")
    if stored:
        text += f"; {', '.join(stored)} rounds the weights that it stores"
    rounding = [str(b.clause) for b in bound if b.method.rounds]
    if rounding:
        text += f"; {', '.join(rounding)} rounds what the backward reads, the forward is exact"
    approximate = [str(b.clause) for b in bound if b.clause.approximate]
    return [f"step 0: {text}", f"approximate: {', '.join(approximate) or 'nothing'}"]


_PLACES = {"cpu": "the CPU", "cuda": "the GPU"}


def _kernels(state: Attachment, bound: Sequence[Bound], held: Sequence[Held]) -> list[str]:
    """What computes with stored weights and adapters where there is a choice, and why not the faster way."""
    stored = {(h.storage, h.device) for h in held if h.base}
    names = dict.fromkeys(r["method"] for r, g in zip(state.sites, state.grafts, strict=True) if g.where == "storage")
    lines = [
        f"{name} on {place}: {of_storage(name, device)}"
        for name in names
        for device, place in _PLACES.items()
        if (name, device) in stored
    ]
    drops = any(getattr(b.method, "dropout", 0.0) for b in bound)
    adapted = any(g.where != "storage" for g in state.grafts) and any(device == "cpu" for _, device in stored)
    if adapted and (drops or operators.kernels().refusal()):
        lines.append(f"adapters on the CPU: {operators.route()}")
    return lines


def _routes(state: Attachment) -> list[str]:
    """Whether a method computes with its factors or its dense matrix, where that was a choice."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for graft in state.grafts:
        if graft.route:
            found[graft.label, graft.route].append(graft.path)
    return [f"{label} x{len(paths)} at {summarise(paths)}: {route}" for (label, route), paths in found.items()]


def _regimes(model: nn.Module, state: Attachment) -> list[str]:
    """How what trains is trained, and how much of it is at work now."""
    tensors = trained(model, state.grafts)
    works = sum(t.names[0] not in state.resting for t in tensors)
    found = []
    for regime in state.regimes:
        text = f"{works} of {len(tensors)} tensors at work" if regime.choose else f"{regime.gradient} gradients"
        if regime.gradient == "fused" and state.backend is not None:
            text += "; a compiled backward hands over those of its graph together"
        found.append(f"{regime.clause}: {text}")
    return found


def _use(model: nn.Module, state: Attachment) -> list[str]:
    if not any(graft.adapter for graft in state.grafts):
        return []
    weights = [
        f"{name} {weight}" if isinstance(weight, list) else f"{name} {weight:g}"
        for name, weight in in_use(model).items()
    ]
    return [f"in use: {', '.join(weights)}"]


def _calls(model: nn.Module, state: Attachment, records: Sequence[GraphRecord]) -> list[str]:
    graphs = f"{len(records)} graph{'' if len(records) == 1 else 's'} captured"
    if not isinstance(model._compiled_call_impl, CompiledCallBase):
        if records:
            return [f"{graphs} by torch.compile of this model or a part of it; calls through it are not counted"]
        return ["not compiled: every call runs in eager"]
    head = f"compiled with backend {state.backend}"
    if not state.calls.total:
        return [f"{head}, not called yet: graphs are captured by the first call"]
    lines = [f"{head}: {_plural(state.calls.total, 'call')}, {state.calls.eager or 'none'} in eager, {graphs}"]
    if state.calls.eager:
        lines.append(
            "  the result is right, the speed is not: Dynamo fell back (recompile limit, graph break or compilation "
            "disabled); TORCH_LOGS=recompiles,graph_breaks tells why"
        )
    return lines


def _graphs(records: Sequence[GraphRecord], state: Attachment) -> list[list[str]]:
    """One part per graph; what repeats an earlier graph is named, not repeated."""
    parts, known = [], {}
    for record in records:
        heading = graph_heading(record)
        body = [[*_passes(record)], ["", *_operators(record, state)]]
        plain = tuple(line for line in (*_passes(record, times=False), *body[1]))
        if plain in known:
            parts.append([f"{heading}: as {known[plain]}, {duration(sum(p.seconds for p in record.passes))} in passes"])
            continue
        known[plain] = record.title
        parts.append([heading, *(f"  {line}".rstrip() for lines in body for line in lines)])
    return parts


def graph_heading(record: GraphRecord) -> str:
    """`graph_0: training, input_ids int64[2, 9]; 230 -> 222 nodes`."""
    kind = "training" if record.training else "inference"
    inputs = f", {', '.join(record.inputs)}" if record.inputs else ""
    return f"{record.title}: {kind}{inputs}; {record.nodes_before:,} -> {record.nodes_after:,} nodes"


def _passes(record: GraphRecord, times: bool = True) -> list[str]:
    rows = [("pass", "time", "edits")]
    for done in record.passes:
        headings = [g.heading for g in group(done.edits)] or ["none"]
        rows.append((done.name, duration(done.seconds) if times else "", headings[0]))
        rows += [("", "", heading) for heading in headings[1:]]
    return table(rows, right={1})


def _operators(record: GraphRecord, state: Attachment) -> list[str]:
    """Which operator computes each adapted module of a graph, and why not the fused one."""
    reasons = {note.site: note.text for note in record.notes}
    fused = served_by(record.passes)
    factored = {e.site for p in record.passes if p.name == "factor" for e in p.edits}
    serving: dict[tuple[str, str], list[str]] = defaultdict(list)
    names = captured_as(_computed(state), record)
    for path, grafts in _computed(state).items():
        if (site := names.get(path)) is None:
            continue
        labels = ", ".join(dict.fromkeys(g.label for g in grafts))
        entered = all(g.where in ("tokens", "past", "side") for g in grafts)  # there is no product to fuse with
        reason = reasons.get(site, "" if entered or site in {*fused, *factored} else "no rule for it")
        op = ", ".join(fused.get(site, ()) + ((PLAIN,) if reason or site not in fused else ()))
        serving[(op, f"{labels}: {reason}" if reason else labels)].append(path)
    rows = [("operator", "sites", "where", "what")]
    rows += [(op, str(len(paths)), summarise(paths), what) for (op, what), paths in serving.items()]
    told = {path for paths in serving.values() for path in paths}
    lines = table(rows, right={1}) if len(rows) > 1 else []
    return lines + [f"note: {n.site or '(model)'}: {n.text}" for n in record.notes if n.site not in told]


def _computed(state: Attachment) -> dict[str, list[Graft]]:
    """The grafts that a graph computes, by module path; a base tensor that trains needs no operator of ours,
    and what a side network hands to another one changes nothing by itself."""
    found: dict[str, list[Graft]] = defaultdict(list)
    for graft in state.grafts:
        if graft.where != "train" and graft.op is not None:
            found[graft.path].append(graft)
    return found


def served_by(passes: Iterable[PassRecord]) -> dict[str, tuple[str, ...]]:
    """The fused operators that compute modules, by path."""
    found: dict[str, set[str]] = defaultdict(set)
    for edit in (e for p in passes for e in p.edits):
        if names := {name for name in FUSED if any(f"= {name}(" in line for line in edit.added)}:
            found[edit.site] |= names
    return {site: tuple(f"rewrite.{name}" for name in FUSED if name in names) for site, names in found.items()}


def captured_as(paths: Collection[str], record: GraphRecord) -> dict[str, str]:
    """The names that modules have in a graph, for those that are in it.

    In a graph of a part names are relative to the part, and stand for every part that runs the same code.
    """
    sites = {edit.site for edit in record.edits}
    whole = {path: path for path in paths if path in sites}
    if whole:
        return whole
    ends = {path: [path[m.end() :] for m in re.finditer(r"\.", path)] for path in paths}
    return {path: next(e for e in names if e in sites) for path, names in ends.items() if sites & set(names)}


def _missing(records: Sequence[GraphRecord], state: Attachment) -> list[str]:
    """Planned sites that no captured graph holds; before the first graph that goes without saying."""
    if not records:
        return []
    missing: dict[str, list[str]] = defaultdict(list)
    computed = _computed(state)
    captured = {path for record in records for path in captured_as(computed, record)}
    for path, grafts in computed.items():
        if path not in captured:
            for graft in grafts:
                missing[graft.label].append(path)
    return [f"not captured yet: {label} x{len(paths)} at {summarise(paths)}" for label, paths in missing.items()]


def _notes(state: Attachment) -> list[str]:
    return [f"note: {note}" for note in state.notes]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
