"""Resolving a spec against a model: which method goes where, or an error that points at the words that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from rewrite.bind import Bound, bind, canonical
from rewrite.blocks import network
from rewrite.inventory import Inventory
from rewrite.method import Method, refusal
from rewrite.methods import registry
from rewrite.parser import parse as parse_text
from rewrite.passes.record import summarise
from rewrite.regime import Regime
from rewrite.selection import Selection
from rewrite.sites import Site
from rewrite.spec import Call, Clause, Spec
from rewrite.table import table


@dataclass(frozen=True)
class Placement:
    """One method at one site."""

    site: Site
    method: Method
    clause: Clause
    name: str  # of the adapter at its module, unique there

    @property
    def trained(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of the base tensors that this placement trains."""
        return tuple(_trained(self.method, self.site).items())

    @property
    def trainable(self) -> int:
        """How many numbers this placement trains, but for those that it shares with others."""
        params = self.method.params(self.site).values()
        own = sum(_numel(p.shape) for p in params if p.trainable and not p.shared)
        return own + sum(_numel(shape) for _, shape in self.trained)


@dataclass(frozen=True)
class Policy:
    """A clause that places nothing: how its sites, or without any the whole model, are trained or what they keep."""

    method: Method
    clause: Clause
    sites: tuple[Site, ...] = ()


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
    policies: tuple[Policy, ...] = ()

    def __len__(self) -> int:
        return len(self.placements)

    @property
    def trainable(self) -> int:
        shared: dict[tuple[int, str], tuple[int, ...]] = {}  # as large as the largest site of the clause
        for placed in self.placements:
            for name, p in placed.method.params(placed.site).items():
                if p.shared and p.trainable:
                    key = (id(placed.clause), name)
                    shared[key] = tuple(map(max, shared.get(key, p.shape), p.shape))
        return sum(p.trainable for p in self.placements) + sum(map(_numel, shared.values()))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that something is placed at, in the order of the placements."""
        return tuple(p.site for p in self.placements)

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per placement, as `rewrite.json` keeps them."""
        return [
            {
                "site": p.site.name,
                "role": p.site.roles[0],
                "layer": p.site.layer,
                "rows": p.site.rows and list(astuple(p.site.rows)),
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
        policies = [f"{p.clause}{_where(p)}" for p in self.policies]
        return "\n".join([head, *policies, "", *placed, *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__


def _where(policy: Policy) -> str:
    return f": {summarise([s.name for s in policy.sites])}" if policy.sites else ": the whole model"


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


def _trained(method: Method, site: Site) -> dict[str, tuple[int, ...]]:
    """The base tensors of a site that a method trains, by name, with their shapes."""
    trains = method.trains
    return {name: shape for name, shape in site.place.tensors if trains is True or (trains and name in trains)}


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
    resolver = _Resolver(inventory, spec.source or str(spec), spec.aliases)
    if not inventory.places:
        raise resolver.error(bound[0].clause, f"{inventory.model} has no parameters: there is nothing to adapt")
    placements: list[Placement] = []
    policies = [resolver.policy(b, bound) for b in bound if b.method.policy]
    resolver.check_kept(policies)
    bound = tuple(b for b in bound if not b.method.policy)
    trained = [b for b in bound if b.method.trains]
    taken = {
        s.weight for b in trained for s in resolver.select(b.sites, b.method) if s.place.tensor in _trained(b.method, s)
    }
    for b in bound:
        placements += resolver.place(b, taken, placements)
    placements += resolver.all(policies, placements)
    resolver.check_storage(placements)
    notes, made = tuple(resolver.notes), tuple(placements)
    return Plan(inventory.model, str(canonical_spec), made, notes, parameters, tuple(policies))


class _Resolver(Selection):
    """Places the clauses of one spec."""

    def all(self, policies: Sequence[Policy], before: list[Placement]) -> list[Placement]:
        """The whole model as what trains, where a clause says how and no other says what: but for what is stored, and
        for blocks that the clause does not name."""
        how = [p for p in policies if isinstance(p.method, Regime)]
        if not how or any(p.method.view() != "storage" for p in before):
            return []
        full, stored = registry()["full"](), {p.site.weight for p in before}
        blocks = [{(s.stack, s.layer) for s in p.sites} for p in how if p.sites]
        sites = [s for s in self.sites if s.kind in full.kinds and s.rows is None and s.weight not in stored]
        sites = [s for s in sites if s.stack is None or all((s.stack, s.layer) in chosen for chosen in blocks)]
        clause = replace(how[0].clause, call=Call(full.name), sites=None)
        if stored:
            self.notes.append(f"{how[0].method.name} trains all of the model but for the {len(stored)} stored weights")
        return self.place(Bound(full, clause), set(), before, sites)

    def place(
        self, bound: Bound, trained: set[str], before: list[Placement], chosen: list[Site] | None = None
    ) -> list[Placement]:
        """The placements of one clause at its sites, or at those `chosen`, checked against the clauses before it."""
        clause, method = bound.clause, bound.method
        if chosen is None:
            chosen = self.named(bound, trained)
        if method.view() in ("train", "storage"):
            chosen = self.whole(clause, method, chosen)
        if method.trains:
            chosen = self.having(clause, method, chosen)
            chosen = self.once(chosen, {p.site.path for p in before if p.method.trains})
        if method.view() == "side":
            chosen = self.network(clause, method, chosen)
        placed = []
        for site in chosen:
            self.check(clause, method, site, [p for p in before if p.site.weight == site.weight])
            label = clause.label or method.name
            part = label if site.place.tensor == "weight" else f"{label}_{site.place.tensor}"
            part = part if site.rows is None else f"{part}_{site.roles[0].rpartition('.')[2]}"
            used = {p.name for p in (*before, *placed) if p.site.path == site.path}
            name = part if part not in used else next(f"{part}_{i}" for i in range(2, 999) if f"{part}_{i}" not in used)
            placed.append(Placement(site, method, clause, name))
        self.note_tied(clause)
        told: dict[str, list[str]] = {}
        for site in chosen:
            if (text := method.note(site)) is not None:
                told.setdefault(text, []).append(site.name)
        self.notes += [f"{summarise(names)}: {text}" for text, names in told.items()]
        return placed

    def named(self, bound: Bound, trained: set[str]) -> list[Site]:
        """The sites that a clause selects: its `base` is what no other clause trains."""
        chosen = self.select(bound.sites, bound.method)
        if any(t.text == "base" for t in bound.sites.leaves()) and not bound.method.trains:
            return [s for s in chosen if s.weight not in trained]
        return chosen

    def network(self, clause: Clause, method: Method, chosen: list[Site]) -> list[Site]:
        """The blocks chosen with the places where a side network begins and ends."""
        for site in chosen:
            self.check(clause, method, site, [])
        found = network(chosen, method.ends, method.reads)
        if not found:
            raise self.error(clause, f"{method.name} joins in front of the last block, and '{clause}' has no other")
        return found

    def policy(self, bound: Bound, every: Sequence[Bound]) -> Policy:
        """A clause that places nothing, checked against its sites and the other clauses."""
        clause, method = bound.clause, bound.method
        sites = () if clause.sites is None else tuple(self.select(bound.sites, method))
        for site in sites:
            if (reason := method.fits(site)) is not None:
                raise self.error(clause, f"{method.name} does not fit {site.name}: {reason}")
        if (reason := method.beside([b.method for b in every if b is not bound], sites)) is not None:
            raise self.error(clause, f"{method.name} cannot stand here: {reason}")
        return Policy(method, clause, sites)

    def check_kept(self, policies: Sequence[Policy]) -> None:
        """Two clauses say different things of a value that a step saves only where one of them names no sites."""
        known: dict[tuple[type, str], Policy] = {}
        for policy in policies:
            rule = policy.method.keeps(policy.clause.approximate)
            for path in [s.path for s in policy.sites] if policy.clause.sites is not None else [""]:
                other = None if rule is None else known.setdefault((type(rule), path), policy)
                if other is not None and other is not policy:
                    first, where = other.clause, path or "the whole model"
                    hint = f"leave it out of one of them: -{policy.sites[0].roles[0]}" if path else "write it once"
                    raise self.error(policy.clause, f"'{policy.clause}' and '{first}' are both about {where}", hint)

    def whole(self, clause: Clause, method: Method, chosen: list[Site]) -> list[Site]:
        """The chosen sites with all parts of a fused weight as that weight, for methods that take nothing less."""
        wholes = {s.weight: s for s in self.sites if s.rows is None}
        rows: dict[str, int] = {}
        for site in chosen:
            rows[site.weight] = rows.get(site.weight, 0) + site.out_features
        for site in chosen:
            if site.rows is not None and rows[site.weight] < site.rows.width:
                raise self.error(
                    clause,
                    f"{method.name} takes whole weights, {site.name} is a part of one",
                    f"write {wholes[site.weight].roles[0]}",
                )
        return list({s.weight: wholes.get(s.weight, s) for s in chosen}.values())

    def having(self, clause: Clause, method: Method, chosen: list[Site]) -> list[Site]:
        """Those of the chosen sites that have a tensor which the method trains."""
        kept = [s for s in chosen if _trained(method, s)]
        if not kept:
            wanted = " or ".join(method.trains) if isinstance(method.trains, tuple) else "tensor"
            raise self.error(clause, f"'{clause}' selects {len(chosen)} sites, none of which has a {wanted} to train")
        if len(kept) < len(chosen):
            left = f"{len(chosen) - len(kept)} of {len(chosen)} sites"
            self.notes.append(f"'{clause}' trains nothing at {left}: they have no such tensor")
        return kept

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
        if (reason := refusal(method, site)) is not None:
            raise self.error(clause, f"{method.name} does not fit {site.name}: {reason}")
        view = method.view()
        if view in ("tokens", "past") and clause.label:
            raise self.error(clause, f"{method.name} changes how many tokens there are: it cannot be switched by name")
        if view in ("storage", "weight") and site.place.tied and not site.shared:
            raise self.error(
                clause,
                f"{method.name} would replace the weight of {site.path}, which {site.place.tied[0]} shares",
                f"leave it out: -{site.roles[0]}" if site.roles[0] != "other" else "",
            )
        for other in others:
            theirs = other.method.view()
            mine, other_s = _trained(method, site), _trained(other.method, other.site)
            if view == theirs == "train" and not mine.keys() & other_s.keys():
                continue
            if {view, theirs} == {"train", "storage"} and site.place.tensor not in mine | other_s:
                continue
            if {view, theirs} <= {"train", "storage"}:
                raise self.error(
                    clause,
                    f"'{clause}' and '{other.clause}' cannot share {site.path}: "
                    + ("it would be stored twice" if view == theirs == "storage" else
                       "it would be trained twice" if view == theirs else "a stored weight cannot be trained"),
                )  # fmt: skip

    def check_storage(self, placements: list[Placement]) -> None:
        """Methods that make up for what a storage format loses stand where there is one."""
        stored = {p.site.weight for p in placements if p.method.view() == "storage"}
        for placed in placements:
            if placed.method.needs_storage and placed.site.weight not in stored:
                raise self.error(
                    placed.clause,
                    f"{placed.method.name} does not fit {placed.site.name}: {placed.clause.call} makes up for what "
                    "rounding loses, and this weight is not rounded",
                    f"add '+ nf4({placed.site.roles[0]})', or leave it out",
                )

    def note_tied(self, clause: Clause) -> None:
        words = {t.text for t in clause.sites.leaves()} if clause.sites else set()
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
