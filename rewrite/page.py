"""The diff as one HTML page: colours the listings, compares them line by line, and fills the template.

Everything that is text of a model or a graph passes through jinja2's or markupsafe's escaping.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rewrite.listing import relative, tokens
from rewrite.passes.record import Edit, GraphRecord, Group, group
from rewrite.picture import layer
from rewrite.table import duration, share, size
from rewrite.version import __version__

if TYPE_CHECKING:
    from rewrite.diff import Diff

_CONTEXT = 3  # unchanged lines shown around a change
Side = tuple[int, Markup] | None


@dataclass(frozen=True)
class Block:
    """A run of the full programs side by side: `same` (folded when long) or `changed`."""

    changed: bool
    folded: bool
    rows: tuple[tuple[Side, Side], ...]


def page(diff: Diff) -> str:
    """The HTML of a diff."""
    environment = Environment(
        loader=PackageLoader("rewrite"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "size": size, "code": code, "pattern": pattern, "spec": _spec}
    return environment.get_template("diff.html.j2").render(
        diff=diff,
        share=share(diff.trainable, diff.parameters),
        graphs=[_graph(record) for record in diff.graphs],
        version=__version__,
    )


def _graph(record: GraphRecord) -> dict[str, Any]:
    site, panels = layer(record)
    total = sum(p.seconds for p in record.passes)
    starts = itertools.accumulate((p.seconds for p in record.passes), initial=0.0)
    return {
        "record": record,
        "seconds": total,
        "passes": [
            {"name": p.name, "edits": len(p.edits), "seconds": p.seconds, "at": at / total, "width": p.seconds / total}
            for p, at in zip(record.passes, starts, strict=False)
        ]
        if total
        else [],
        "groups": [_card(g) for g in group(record.edits)],
        "site": site,
        "panels": panels,
        "program": list(compare(record.before, record.after)),
    }


def _card(g: Group) -> dict[str, Any]:
    before, arrow, after = g.equation.partition("->")
    return {
        "group": g,
        "before": before.strip(),
        "after": after.strip() if arrow else "",
        "patterns": re.split(r", (?![^\[]*\])", g.where) if g.where else ["(model)"],
        "example": g.example,
        "lines": _sides(g.example),
    }


def _sides(edit: Edit) -> tuple[list[Markup], list[Markup]]:
    return [code(line, edit.site) for line in edit.removed], [code(line, edit.site) for line in edit.added]


def code(text: str, site: str = "") -> Markup:
    """A line of a listing with its tokens in spans; class p marks what the page can hide."""
    return Markup("").join(_span(kind, part) for kind, part in relative(text, site))


def _spec(text: str) -> Markup:
    return Markup("").join(_span(kind if kind in ("f", "n", "s", "k") else "", part) for kind, part in tokens(text))


def _span(kind: str, text: str) -> Markup:
    return Markup('<span class="{}">{}</span>').format(kind, text) if kind and kind != "v" else escape(text)


def pattern(text: str) -> Markup:
    """A pattern of sites with its ranges and alternatives marked: `h.[0-3].attn.[q,v]`."""
    parts = re.split(r"(\[[^\]]*\])", text)
    return Markup("").join(Markup("<b>{}</b>").format(p) if p.startswith("[") else escape(p) for p in parts)


def compare(before: str, after: str) -> Iterator[Block]:
    """Two programs side by side, line by line; long runs without a change are folded."""
    old, new = before.splitlines(), after.splitlines()
    left, right = _listing(old), _listing(new)
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        rows = tuple(itertools.zip_longest(left[a:b], right[c:d]))
        if tag != "equal":
            yield Block(True, False, rows)
            continue
        head = 0 if a == 0 else _CONTEXT
        tail = 0 if b == len(old) else _CONTEXT
        if len(rows) <= head + tail + 2:
            yield Block(False, False, rows)
            continue
        for folded, part in (
            (False, rows[:head]),
            (True, rows[head : len(rows) - tail]),
            (False, rows[len(rows) - tail :]),
        ):
            if part:
                yield Block(False, folded, part)


def _listing(lines: Sequence[str]) -> list[tuple[int, Markup]]:
    site, out = "", []
    for number, line in enumerate(lines, 1):
        if line.startswith("    # "):
            site = line[6:]
        out.append((number, code(line, site)))
    return out
