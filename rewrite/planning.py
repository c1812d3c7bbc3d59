"""Resolving a spec against a model: which method goes where, or an error that points at the words that do not fit."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewrite import sites as roles
from rewrite.bind import Bound, bind, canonical
from rewrite.errors import ResolveError, nearest
from rewrite.inventory import Inventory
from rewrite.method import Method
from rewrite.methods import registry
from rewrite.parser import parse as parse_text
from rewrite.passes.record import summarise
from rewrite.sites import Site
from rewrite.spec import Clause, Selector, Spec, Term
from rewrite.table import table


@dataclass(frozen=True)
class Placement:
    """One method at one site."""

    site: Site
    method: Method
    clause: Clause
    name: str  # of the adapter at its module, unique there

    @property
    def trainable(self) -> int:
        """How many numbers this placement trains."""
        if self.method.trains:
            return sum(_numel(shape) for _, shape in self.site.place.tensors)
        return sum(_numel(p.shape) for p in self.method.params(self.site).values() if p.trainable)


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model, before anything is done; prints as a table.

    >>> plan(model, "lora(r=8)@attn.q,v")            # doctest: +SKIP
    """

    model: str
    spec: str
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]
    parameters: int

    def __len__(self) -> int:
        return len(self.placements)

    @property
    def trainable(self) -> int:
        return sum(p.trainable for p in self.placements)

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per placement, as `rewrite.json` keeps them."""
        return [
            {
                "site": p.site.name,
                "role": p.site.roles[0],
                "layer": p.site.layer,
                "rows": p.site.rows,
                "shape": list(p.site.place.shape),
                "method": p.method.name,
                "trainable": p.trainable,
            }
            for p in self.placements
        ]

    def __str__(self) -> str:
        share = f" ({self.trainable / self.parameters:.3%} of {self.parameters:,})" if self.parameters else ""
        head = f"{self.model}: {self.spec}\n{len(self)} placements, {self.trainable:,} trainable{share}"
        placed = placement_table(
            (str(p.clause.call).removesuffix("()"), p.site.roles[0], p.site.name, p.site.place.shape, p.trainable)
            for p in self.placements
        )
        return "\n".join([head, "", *placed, *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__


def placement_table(placed: Iterable[tuple[str, str, str, tuple[int, ...], int]]) -> list[str]:
    """Lines of a table of (method, role, site, shape, trainable), grouped over layers."""
    groups: dict[tuple[str, str], list[tuple[str, tuple[int, ...], int]]] = {}
    for method, role, site, shape, trainable in placed:
        groups.setdefault((method, role), []).append((site, tuple(shape), trainable))
    rows = [("method", "role", "where", "sites", "shape", "trainable")]
    for (method, role), group in groups.items():
        shapes = " ".join("x".join(map(str, shape)) for shape in sorted({shape for _, shape, _ in group}))
        count = f"{sum(trainable for _, _, trainable in group):,}"
        rows.append((method, role, summarise([site for site, _, _ in group]), str(len(group)), shapes, count))
    return table(rows)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read(text: str | Spec, methods: Mapping[str, type] | None = None) -> tuple[Spec, tuple[Bound, ...]]:
    """A spec in its canonical form with the methods that it names; raises `SpecError`."""
    methods = methods or registry()
    spec = parse_text(text) if isinstance(text, str) else text
    bound = bind(spec, methods)
    return parse_text(canonical(spec, methods)), bound


def resolve(inventory: Inventory, text: str | Spec, parameters: int = 0) -> Plan:
    """Place every clause of a spec; raises `SpecError` or `ResolveError`."""
    spec = parse_text(text) if isinstance(text, str) else text
    canonical_spec, bound = read(spec)
    resolver = _Resolver(inventory, spec)
    if not inventory.places:
        raise resolver.error(bound[0].clause, f"{inventory.model} has no parameters: there is nothing to adapt")
    placements: list[Placement] = []
    trained = [b for b in bound if b.method.trains]
    taken = {s.path for b in trained for s in resolver.select(b.sites, b)}
    for b in bound:
        placements += resolver.place(b, taken, placements)
    return Plan(inventory.model, str(canonical_spec), tuple(placements), tuple(resolver.notes), parameters)


class _Resolver:
    def __init__(self, inventory: Inventory, spec: Spec) -> None:
        self.inventory, self.source = inventory, spec.source or str(spec)
        self.sites = roles.find(inventory)
        self.notes: list[str] = []

    def error(self, at: Term | Clause, message: str, hint: str = "") -> ResolveError:
        return ResolveError(message, self.source, at.span[0], at.span[1], hint)

    def select(self, selector: Selector, bound: Bound) -> list[Site]:
        """The sites that a selector names, in the model's order, that the method can stand at."""
        chosen: dict[int, Site] = {}
        for term in selector.terms:
            matched = self.matches(term, bound)
            for number, site in matched:
                if term.minus:
                    chosen.pop(number, None)
                else:
                    chosen[number] = site
            if term.minus:  # a part of a removed module goes too, and the whole of a removed part
                gone = {s.path for _, s in matched}
                chosen = {n: s for n, s in chosen.items() if s.path not in gone}
        if not chosen:
            raise self.error(selector.terms[0], f"'{selector}' selects nothing in {self.inventory.model}")
        return [chosen[n] for n in sorted(chosen)]

    def matches(self, term: Term, bound: Bound) -> list[tuple[int, Site]]:
        found = [(n, s) for n, s in enumerate(self.sites) if _named(term, s)]
        if not found:
            raise self.error(term, f"'{term}' matches nothing in {self.inventory.model}", self.nearest(term))
        fitting = [(n, s) for n, s in found if s.kind in bound.method.kinds]
        if not fitting:
            kinds, method, model = sorted({s.kind for _, s in found}), bound.method, self.inventory.model
            raise self.error(
                term,
                f"{method.name} cannot stand at '{term}': its sites in {model} are of kind {', '.join(kinds)}",
                f"{method.name} takes: {', '.join(sorted(method.kinds))}",
            )
        if term.kind != "role":  # a path names whole modules, unless nothing but parts is there
            whole = {s.path for _, s in fitting if s.rows is None}
            fitting = [(n, s) for n, s in fitting if s.rows is None or s.path not in whole]
        return self.layers(term, fitting)

    def layers(self, term: Term, found: list[tuple[int, Site]]) -> list[tuple[int, Site]]:
        """Of the sites found, those in the layers that the term asks for."""
        if term.layers is None:
            return found
        counts = {
            stack: 1 + max(s.layer or 0 for s in self.sites if s.stack == stack)
            for stack in {s.stack for _, s in found if s.stack}
        }
        if not counts:
            raise self.error(term, f"'{term}' asks for layers, but its sites in {self.inventory.model} have none")
        try:
            wanted = {stack: set(term.layers.select(count)) for stack, count in counts.items()}
        except IndexError as error:
            raise self.error(term, f"'{term}': {error}") from None
        chosen = [(n, s) for n, s in found if s.stack and s.layer in wanted[s.stack]]
        if not chosen:
            total = ", ".join(str(c) for c in sorted(set(counts.values())))
            raise self.error(term, f"'{term}' selects no layer: {self.inventory.model} has {total}")
        return chosen

    def nearest(self, term: Term) -> str:
        """What the model has that is most like a term that matched nothing."""
        words = {role: sum(role in s.roles for s in self.sites) for s in self.sites for role in s.roles}
        words.pop("other", None)
        close = nearest(term.text, words)
        if close:
            return "nearest: " + ", ".join(f"{w} ({words[w]})" for w in close)
        paths = nearest(term.text, {s.path for s in self.sites})
        if paths:
            return "nearest: " + ", ".join(paths)
        listed = sorted(w for w in words if not w.startswith(("enc", "dec")))
        return "it has: " + ", ".join(listed) if listed else ""

    def place(self, bound: Bound, trained: set[str], before: list[Placement]) -> list[Placement]:
        """The placements of one clause, checked against the method and the clauses before it."""
        clause, method = bound.clause, bound.method
        chosen = self.select(bound.sites, bound)
        if any(t.text == "base" for t in bound.sites.terms if not t.minus) and not method.trains:
            chosen = [s for s in chosen if s.path not in trained]
        if method.view() in ("train", "storage"):
            chosen = self.whole(clause, method, chosen)
        if method.trains:
            chosen = self.once(chosen, {p.site.path for p in before if p.method.trains})
        placed = []
        for site in chosen:
            self.check(clause, method, site, [p for p in before if p.site.path == site.path])
            label = clause.label or method.name
            part = label if site.rows is None else f"{label}_{site.roles[0].rpartition('.')[2]}"
            used = {p.name for p in (*before, *placed) if p.site.path == site.path}
            name = part if part not in used else next(f"{part}_{i}" for i in range(2, 999) if f"{part}_{i}" not in used)
            placed.append(Placement(site, method, clause, name))
        self.note_tied(clause)
        return placed

    def whole(self, clause: Clause, method: Method, chosen: list[Site]) -> list[Site]:
        """The chosen sites with all parts of a fused weight as that weight, for methods that take nothing less."""
        wholes = {s.path: s for s in self.sites if s.rows is None}
        rows: dict[str, int] = {}
        for site in chosen:
            rows[site.path] = rows.get(site.path, 0) + site.out_features
        for site in chosen:
            if site.rows is not None and rows[site.path] < site.place.shape[0]:
                raise self.error(
                    clause,
                    f"{method.name} takes whole weights, {site.name} is a part of one",
                    f"write {wholes[site.path].roles[0]}",
                )
        return list({s.path: wholes.get(s.path, s) for s in chosen}.values())

    def once(self, chosen: list[Site], trained: set[str]) -> list[Site]:
        """The chosen sites without those whose one tensor is trained under another name already."""
        kept: list[Site] = []
        for site in chosen:
            first = next((p for p in site.place.tied if p in trained), None)
            if first is not None and len(site.place.tensors) == 1:
                self.notes.append(f"{site.path} shares its weight with {first}: it is trained once, under that name")
            else:
                kept.append(site)
                trained = trained | {site.path}
        return kept

    def check(self, clause: Clause, method: Method, site: Site, others: list[Placement]) -> None:
        if not (site.dtype.is_floating_point or site.dtype.is_complex):
            kind = str(site.dtype).removeprefix("torch.")
            raise self.error(clause, f"{site.path} has {kind} weights: {method.name} needs floating-point ones")
        if (reason := method.fits(site)) is not None:
            raise self.error(clause, f"{method.name} does not fit {site.name}: {reason}")
        view = method.view()
        if view in ("storage", "weight") and site.place.tied:
            raise self.error(
                clause,
                f"{method.name} would replace the weight of {site.path}, which {site.place.tied[0]} shares",
                f"leave it out: -{site.roles[0]}" if site.roles[0] != "other" else "",
            )
        for other in others:
            theirs = other.method.view()
            if {view, theirs} <= {"train", "storage"}:
                raise self.error(
                    clause,
                    f"'{clause}' and '{other.clause}' cannot share {site.path}: "
                    + ("it would be stored twice" if view == theirs == "storage" else
                       "it would be trained twice" if view == theirs else "a stored weight cannot be trained"),
                )  # fmt: skip

    def note_tied(self, clause: Clause) -> None:
        words = {t.text for t in clause.sites.terms if not t.minus} if clause.sites else set()
        if "head" in words:
            return
        for place in self.inventory.places:
            if (
                words & {"linear", "base"}
                and place.tied
                and any(s.place is place and "head" in s.roles for s in self.sites)
            ):
                self.notes.append(
                    f"{place.path} is not among {'/'.join(sorted(words & {'linear', 'base'}))}: "
                    f"it shares its weight with {place.tied[0]}; name 'head' to adapt it"
                )


def _named(term: Term, site: Site) -> bool:
    if term.kind == "role":
        return term.text in site.roles
    if term.kind == "glob":
        return any(fnmatch.fnmatchcase(path, term.text) for path in _upwards(site.path))
    return any(re.fullmatch(term.text, path) for path in _upwards(site.path))


def _upwards(path: str) -> Iterable[str]:
    """A path and all that contain it: a pattern that names a container names what is in it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
