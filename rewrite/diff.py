"""diff: what the passes changed in each captured graph, computed from their records, grouped over layers.

As text, as JSON (complete), and as an HTML page.  The program listings are the records' own: nothing is compared
that was not recorded.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rewrite.codegen.files import write
from rewrite.errors import RewriteError
from rewrite.explain import graph_heading
from rewrite.listing import short
from rewrite.passes.record import Edit, GraphRecord, Group, Note, PassRecord, group
from rewrite.runtime.attach import require
from rewrite.runtime.captures import records_of
from rewrite.runtime.holdings import holdings


@dataclass(frozen=True)
class Diff:
    """The edits of every graph captured from a model; prints as a unified diff with one example per group.

    `parameters` of the base, of which `bytes` are stored; `trainable` parameters in all.
    """

    model: str
    spec: str
    graphs: tuple[GraphRecord, ...]
    parameters: int = 0
    trainable: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        head = f"{self.model}: {self.spec}"
        if not self.graphs:
            return f"{head}\nno graph captured yet: call the compiled model first"
        parts, known = [head], {}
        for record in self.graphs:
            parts.append("\n".join([*_heading(record), *_hunks(record, known), *_notes(record)]))
        return "\n\n".join(parts)

    __repr__ = __str__

    def to_json(self) -> str:
        """Everything, as JSON: each graph's record with its programs, and its groups."""
        data = {f: getattr(self, f) for f in ("model", "spec", "parameters", "trainable", "bytes")}
        graphs = [record.to_dict() | {"groups": [_group(g) for g in group(record.edits)]} for record in self.graphs]
        return json.dumps(data | {"graphs": graphs}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Diff:
        """The diff that `to_json` wrote; raises `RewriteError` for any other text."""
        try:
            data = json.loads(text)
            graphs = tuple(_record(g) for g in data.pop("graphs"))
            return cls(**data, graphs=graphs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RewriteError(f"this is no diff written by to_json: {error}") from error

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that needs no network, whole or not at all; returns where it is."""
        from rewrite.page import page  # jinja2 is needed by this alone

        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, page(self).encode("utf-8"))
        except OSError as error:
            raise RewriteError(f"cannot write the diff to {file}: {error}") from error
        return file


def diff(model: nn.Module) -> Diff:
    """What the passes changed in the graphs captured from `model` so far; raises `RewriteError` on a plain model.

    Example: `print(rewrite.diff(model)); rewrite.diff(model).to_html("diff.html")`
    """
    state, held = require(model), holdings(model)
    return Diff(
        type(model).__name__,
        state.spec,
        tuple(copy.deepcopy(records_of(model))),  # the backward may still be on its way
        sum(h.parameters for h in held if h.base),
        sum(h.parameters for h in held if h.trains),
        sum(h.bytes for h in held if h.base),
    )


def _heading(record: GraphRecord) -> list[str]:
    done = ", ".join(f"{p.name} {len(p.edits)}" for p in record.passes if p.edits) or "none"
    return [f"--- {graph_heading(record)}", f"+++ {len(record.edits):,} edits: {done}"]


def _hunks(record: GraphRecord, known: dict[tuple[str, str], str]) -> list[str]:
    """A hunk per group; one that an earlier graph has too is named only.  `known`: (heading, body) -> graph."""
    lines: list[str] = []
    for g in group(record.edits):
        site = g.example.site
        body = [f" {g.equation}", f" {g.source}, here at {site or '(model)'}:"]
        body += [f"-{short(line, site)}" for line in g.example.removed]
        body += [f"+{short(line, site)}" for line in g.example.added]
        # `training` is an argument of typed nodes, and says nothing about the edit.
        key = g.heading, re.sub(r"training=(True|False)", "training", "\n".join(body))
        first = known.setdefault(key, record.title)
        lines += ["", f"@@ {g.heading} @@", *body] if first == record.title else [f"@@ {g.heading} @@ as in {first}"]
    return lines


def _notes(record: GraphRecord) -> list[str]:
    return ["", *(f"note: {n.site or '(model)'}: {n.text}" for n in record.notes)] if record.notes else []


def _group(g: Group) -> dict[str, Any]:
    return {"heading": g.heading, "where": g.where} | asdict(g)


def _record(data: dict[str, Any]) -> GraphRecord:
    data = {key: value for key, value in data.items() if key != "groups"}
    passes = [PassRecord(p["name"], [_edit(e) for e in p["edits"]], p["seconds"]) for p in data.pop("passes")]
    notes = [Note(**n) for n in data.pop("notes")]
    for saved in data["counts"].get("saved", ()):
        saved["shape"] = tuple(saved["shape"])
    data["inputs"], data["arguments"] = tuple(data["inputs"]), tuple(data["arguments"])
    return GraphRecord(**data, passes=passes, notes=notes)


def _edit(data: dict[str, Any]) -> Edit:
    data["removed"], data["added"] = tuple(data["removed"]), tuple(data["added"])
    return Edit(**data)
