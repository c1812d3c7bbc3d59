"""The dataflow of one adapted layer, stage by stage, as coordinates for a drawing.

The nodes are those of the captured graph and of the edits at that layer; nothing is drawn that is not there.
Drawing itself is the template's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rewrite.listing import Node, operator, read, references, short, tokens
from rewrite.passes.record import Edit, GraphRecord
from rewrite.runtime.adapter import ADAPTERS

Kind = Literal["input", "weight", "adapter", "operator", "new", "fused", "output"]
_CHAR, _PAD, _GAP, _ROW, _HEIGHT = 6.7, 22, 18, 74, 40  # pixels: a character, padding, gaps, rows, a box


@dataclass(frozen=True)
class Box:
    """A node: its centre, size, kind and two lines of text."""

    x: float
    y: float
    width: float
    height: float
    kind: Kind
    label: str
    type: str


@dataclass(frozen=True)
class Edge:
    """A curve from box to box, as an SVG path; long ones come in pieces, the last of which has the arrow."""

    path: str
    arrow: bool


@dataclass(frozen=True)
class Panel:
    """One stage of the layer."""

    title: str
    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


@dataclass
class _Vertex:
    name: str
    kind: Kind
    label: str
    type: str
    needs: list[str]
    rank: int = 0
    x: float = 0.0

    @property
    def width(self) -> float:
        return max(len(self.label), len(self.type) * 0.86) * _CHAR + _PAD if self.label else 14.0

    @property
    def height(self) -> float:
        return 28 if self.label and not self.type else _HEIGHT


def layer(record: GraphRecord) -> tuple[str, list[Panel]]:
    """The path of the layer with most edits, and its stages: captured, after the first pass, rewritten."""
    passes = [(p.name, p.edits) for p in record.passes if any(_names(e.added) for e in p.edits)]
    site = _busiest([e for _, edits in passes for e in edits])
    if not site:
        return "", []
    before, after = read(record.before), read(record.after)
    stages = [("captured", *before)]
    touching = [(name, [e for e in edits if site in expand(e.site)]) for name, edits in passes]
    touching = [(name, edits) for name, edits in touching if edits]
    if len(touching) > 1:
        name, edits = touching[0]
        types = {n.name: n.type for n in after[1]}
        stages.append((f"after {name}", before[0], _apply(before[1], edits, types)))
    stages.append((f"after {', '.join(name for name, _ in touching[1:])}" if len(touching) > 1 else "after", *after))
    return site, [draw(title, _vertices(inputs, nodes, site)) for title, inputs, nodes in stages]


def expand(site: str) -> list[str]:
    """The paths that an edit's site names: `a.[q,v]` -> `a.q`, `a.v`."""
    parent, bracket, leaves = site.partition(".[")
    if bracket and leaves.endswith("]"):
        return [f"{parent}.{leaf}" for leaf in leaves[:-1].split(",")]
    return site.split("; ")


def _busiest(edits: Iterable[Edit]) -> str:
    rules: dict[str, set[str]] = defaultdict(set)
    for edit in edits:
        for path in expand(edit.site):
            rules[path].add(edit.rule)
    return max(rules, key=lambda path: len(rules[path]), default="")  # of equals, the first


def _names(lines: Sequence[str]) -> list[str]:
    return [line.partition(" = ")[0] for line in lines if re.match(r"\w+ = ", line)]


def _apply(nodes: Sequence[Node], edits: Sequence[Edit], types: Mapping[str, str]) -> list[Node]:
    """The nodes after some edits: what an edit removed is replaced by what it added, users read the new name."""
    out = list(nodes)
    for edit in edits:
        gone, made = _names(edit.removed), _names(edit.added)
        at = next((i for i, n in enumerate(out) if gone and n.name == gone[-1]), None)
        if at is None or not made:
            continue
        site = out[at].site
        new = [Node(n, t, types.get(n, ""), site, edit.rule) for n, t in zip(made, edit.added, strict=True)]
        new[-1] = replace(new[-1], type=out[at].type)
        rest = [replace(n, text=_renamed(n.text, gone[-1], made[-1])) for n in out[at + 1 :]]
        out = [n for n in [*out[:at], *new, *rest] if n.name not in gone or n.name in made]
    return out


def _renamed(text: str, old: str, new: str) -> str:
    head, equals, value = text.partition(" = ")
    return head + equals + "".join(new if kind == "v" and part == old else part for kind, part in tokens(value))


def _vertices(inputs: Mapping[str, str], nodes: Sequence[Node], site: str) -> dict[str, _Vertex]:
    """The nodes of a layer, what they read from outside, and who reads them."""
    known = {**inputs, **{n.name: n.type for n in nodes}}
    inside = {n.name for n in nodes if n.site == site}
    found: dict[str, _Vertex] = {}
    for node in nodes:
        reads = references(node.text, known)
        if node.name not in inside:
            for name in reads:  # an output: one vertex per module that reads this layer
                if name in inside and (key := f"{name} -> {node.site}") not in found:
                    found[key] = _Vertex(key, "output", _leaf(node.site), "", [name])
            continue
        for name in reads:
            if name not in inside and name not in found and known[name]:  # a size has no type, and is no tensor
                found[name] = _Vertex(name, _outside(name, inputs), short(name, site), known[name], [])
        kind: Kind = "fused" if "fuse" in node.rule else "new" if node.rule else "operator"
        found[node.name] = _Vertex(node.name, kind, _label(node), node.type, reads)
    return _read(found)


def _read(vertices: dict[str, _Vertex]) -> dict[str, _Vertex]:
    """Without what no output depends on: shapes, and nodes that wait for dead code elimination."""
    kept = {v.name for v in vertices.values() if v.kind == "output"}
    for v in reversed(vertices.values()):  # users come after what they read
        if v.name in kept:
            kept.update(v.needs)
    return {name: v for name, v in vertices.items() if name in kept}


def _outside(name: str, inputs: Mapping[str, str]) -> Kind:
    return "input" if name not in inputs else "adapter" if f"_{ADAPTERS}_" in name else "weight"


def _leaf(site: str) -> str:
    return site.rpartition(".")[2] or "model"


def _label(node: Node) -> str:
    constant = re.fullmatch(r"\w+ = \w+\(\w+, (-?\d[\d.e+-]*)\)", node.text)
    return f"{operator(node.text)} {constant.group(1)}" if constant else operator(node.text)


def draw(title: str, vertices: dict[str, _Vertex]) -> Panel:
    """Places vertices in rows by longest path, ordered and aligned by the means of their neighbours."""
    rows = _rows(vertices)
    _align(rows, vertices)
    left = min((v.x - v.width / 2 for v in vertices.values()), default=0) - 8
    right = max((v.x + v.width / 2 for v in vertices.values()), default=0) + 8
    boxes = tuple(
        Box(round(v.x - left, 1), _y(v), round(v.width, 1), v.height, v.kind, v.label, v.type)
        for v in vertices.values()
        if v.label
    )
    edges = tuple(_curve(vertices[need], v, left) for v in vertices.values() for need in v.needs if need in vertices)
    return Panel(title, round(right - left, 1), len(rows) * _ROW - (_ROW - _HEIGHT) + 12, boxes, edges)


def _y(vertex: _Vertex) -> float:
    return vertex.rank * _ROW + _HEIGHT / 2 + 6


def _curve(source: _Vertex, target: _Vertex, left: float) -> Edge:
    x0, y0, x1, y1 = source.x - left, _y(source) + source.height / 2, target.x - left, _y(target) - target.height / 2
    bend = (y1 - y0) / 2
    straight = "" if source.label else f"M{x0:.1f} {y0 - source.height:.1f}V{y0:.1f}"  # past the boxes of its row
    path = f"{straight}M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
    return Edge(path, bool(target.label))


def _rows(vertices: dict[str, _Vertex]) -> list[list[str]]:
    """Ranks every vertex, splits edges that cross rows, and returns the names by row."""
    users: dict[str, list[str]] = defaultdict(list)
    for v in vertices.values():  # in program order: what a vertex reads is ranked already
        v.needs = [n for n in v.needs if n in vertices]
        v.rank = 1 + max((vertices[n].rank for n in v.needs), default=-1)
        for need in v.needs:
            users[need].append(v.name)
    for v in vertices.values():
        if not v.needs and users[v.name]:  # inputs stand right above their first use
            v.rank = min(vertices[u].rank for u in users[v.name]) - 1
    for v in list(vertices.values()):
        v.needs = [_through(vertices, need, v.rank) for need in v.needs]
    rows: list[list[str]] = [[] for _ in range(1 + max((v.rank for v in vertices.values()), default=0))]
    for v in vertices.values():
        rows[v.rank].append(v.name)
    return rows


def _through(vertices: dict[str, _Vertex], need: str, rank: int) -> str:
    """The last of a chain of invisible vertices from `need` down to the row above `rank`."""
    for between in range(vertices[need].rank + 1, rank):
        name = f"{need.partition(' | ')[0]} | {between}"
        if name not in vertices:
            vertices[name] = _Vertex(name, "output", "", "", [need], between)
        need = name
    return need


def _align(rows: list[list[str]], vertices: dict[str, _Vertex]) -> None:
    near: dict[str, list[str]] = defaultdict(list)
    for v in vertices.values():
        for need in v.needs:
            near[v.name].append(need)
            near[need].append(v.name)
    for row in rows:
        _spread(row, vertices, {name: float(i) for i, name in enumerate(row)})
    for sweep in range(12):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {n: sum(vertices[m].x for m in near[n]) / len(near[n]) if near[n] else vertices[n].x for n in row}
            if sweep < 8:
                row.sort(key=wanted.__getitem__)
            _spread(row, vertices, wanted)


def _spread(row: list[str], vertices: dict[str, _Vertex], wanted: dict[str, float]) -> None:
    """Puts a row near where its vertices want to be, in order and without overlaps."""
    edge, shift = float("-inf"), 0.0
    for name in row:
        v = vertices[name]
        v.x = max(wanted[name], edge + v.width / 2)
        shift += v.x - wanted[name]
        edge = v.x + v.width / 2 + _GAP
    for name in row:
        vertices[name].x -= shift / len(row)
