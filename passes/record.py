"""What passes did: one `Edit` per application of a rule, gathered per pass, grouped over layers for reading."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Edit:
    """One application of a rule at one place of the model."""

    rule: str
    site: str  # path of the module whose computation changed
    equation: str  # the rule's `before -> after`
    source: str  # file:line of the rule
    removed: tuple[str, ...]  # nodes as readable lines
    added: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """Something a user should know about a site: a fallback, and its reason."""

    site: str
    text: str


@dataclass
class PassRecord:
    """One pass over one graph: its edits and how long it took (seconds)."""

    name: str
    edits: list[Edit] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class GraphRecord:
    """Everything that happened to one captured graph, from capture to the partitioned backward."""

    title: str = "graph"
    training: bool = False  # captured with gradients on
    broken: bool = False  # ends in a graph break: what follows it reads the results
    arguments: tuple[str, ...] = ()  # paths of the parameters and inputs that it takes, in its order
    inputs: tuple[str, ...] = ()  # the model's inputs as `name dtype[sizes]`, at the sizes it was captured with
    nodes_before: int = 0
    nodes_after: int = 0
    before: str = ""
    after: str = ""
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    rules: list[Any] = field(default_factory=list)  # (path, rule) about what is kept (`passes.keep`)

    @property
    def edits(self) -> list[Edit]:
        return [edit for p in self.passes for edit in p.edits]

    def note(self, site: str, text: str) -> None:
        self.notes.append(Note(site, text))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data (programs included) for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Edits of one rule that differ in nothing but the layer they are at."""

    rule: str
    equation: str
    source: str
    sites: tuple[str, ...]
    example: Edit

    @property
    def where(self) -> str:
        return summarise(self.sites)

    @property
    def heading(self) -> str:
        return f"{self.rule} x{len(self.sites)} at {self.where}"


_NUMBER = re.compile(r"\d+")


def group(edits: Iterable[Edit]) -> list[Group]:
    """Edits of equal shape as one group each, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Edit]] = defaultdict(list)
    for edit in edits:
        shape = _NUMBER.sub("#", edit.site), len(edit.removed), len(edit.added)
        groups[(edit.rule, *shape)].append(edit)
    merged: dict[tuple[Any, ...], list[Edit]] = defaultdict(list)
    for (rule, _, removed, added), members in groups.items():
        parent = _NUMBER.sub("#", members[0].site).rpartition(".")[0]
        merged[(rule, parent, removed, added)].extend(members)
    return [Group(m[0].rule, m[0].equation, m[0].source, tuple(e.site for e in m), m[0]) for m in merged.values()]


def summarise(sites: Sequence[str]) -> str:
    """Sites in one pattern each: numbers as ranges, last names as alternatives; the model itself is `(model)`.

    >>> summarise(["h.0.attn.q", "h.1.attn.q", "h.0.attn.v", "h.1.attn.v"])
    'h.[0-1].attn.[q,v]'
    """
    if not sites:
        return ""
    shapes: dict[str, list[list[int]]] = {}
    for site in (site or "(model)" for site in sites):
        shapes.setdefault(_NUMBER.sub("#", site), []).append([int(n) for n in _NUMBER.findall(site)])
    families: dict[tuple[str, str], list[str]] = {}
    for shape, numbers in shapes.items():
        columns = iter([_ranges(c) for c in zip(*numbers, strict=True)])
        text = re.sub("#", lambda _, columns=columns: next(columns), shape)
        parent, _, leaf = text.rpartition(".")
        families.setdefault((parent, str(len(numbers))), []).append(leaf)
    parts = []
    for (parent, _), leaves in families.items():
        name = leaves[0] if len(leaves) == 1 else f"[{','.join(leaves)}]"
        parts.append(f"{parent}.{name}" if parent else name)
    return ", ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as `[0-2,5]`; a single number as itself."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(runs) == 1 and runs[0][0] == runs[0][1] else f"[{text}]"
