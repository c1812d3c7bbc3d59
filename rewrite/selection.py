"""Selecting sites by the words of a spec: roles, globs, regexes, layers and what is taken away again."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewrite.errors import ResolveError, nearest
from rewrite.inventory import Inventory
from rewrite.paths import upwards
from rewrite.sites import Site, find
from rewrite.spec import Clause, Selector, Term

if TYPE_CHECKING:
    from rewrite.method import Method


class Selection:
    """The sites of one model, and what the words of one text select of them."""

    def __init__(self, inventory: Inventory, source: str, aliases: Sequence[str] = ()) -> None:
        self.inventory, self.source, self.aliases = inventory, source, aliases
        found = find(inventory)
        self.sites = found.sites
        self.notes: list[str] = list(found.notes)

    def error(self, at: Term | Clause, message: str, hint: str = "") -> ResolveError:
        return ResolveError(message, self.source, at.span[0], at.span[1], hint)

    def select(self, selector: Selector, method: Method | None = None) -> list[Site]:
        """The sites that a selector names, in the model's order, that `method` can stand at; all without one."""
        chosen: dict[int, Site] = {}
        for term in selector.terms:
            matched = self.matches(term, method)
            for number, site in matched:
                if term.minus:
                    chosen.pop(number, None)
                else:
                    chosen[number] = site
            if term.minus:  # a part of a removed module goes too, and the whole of a removed part
                chosen = {n: s for n, s in chosen.items() if not any(_overlap(s, gone) for _, gone in matched)}
        if not chosen:
            raise self.error(selector.terms[0], f"'{selector}' selects nothing in {self.inventory.model}")
        return [chosen[n] for n in sorted(chosen)]

    def matches(self, term: Term, method: Method | None) -> list[tuple[int, Site]]:
        if term.group is not None:  # selected by itself, then added or removed as one
            inside = {id(site) for site in self.select(term.group, method)}
            return [(n, s) for n, s in enumerate(self.sites) if id(s) in inside]
        found = [(n, s) for n, s in enumerate(self.sites) if _named(term, s)]
        if not found:
            raise self.error(term, f"'{term}' matches nothing in {self.inventory.model}", self.nearest(term))
        fitting = [(n, s) for n, s in found if method is None or s.kind in method.kinds]
        if not fitting and method is not None:
            kinds, model = sorted({s.kind for _, s in found}), self.inventory.model
            raise self.error(
                term,
                f"{method.name} cannot stand at '{term}': its sites in {model} are of kind {', '.join(kinds)}",
                f"{method.name} takes: {', '.join(sorted(method.kinds))}",
            )
        if term.kind != "role":  # a path names whole modules, unless nothing but parts is there
            whole = {s.weight for _, s in fitting if s.rows is None}
            fitting = [(n, s) for n, s in fitting if s.rows is None or s.weight not in whole]
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
        words: dict[str, int | str] = {
            role: sum(role in s.roles for s in self.sites) for s in self.sites for role in s.roles
        }
        words.pop("other", None)
        words |= dict.fromkeys(self.aliases, "alias")
        close = nearest(term.text, words)
        if close:
            return "nearest: " + ", ".join(f"{w} ({words[w]})" for w in close)
        paths = nearest(term.text, {s.weight for s in self.sites if s.kind != "block"})
        if paths:
            return "nearest: " + ", ".join(paths)
        listed = sorted(w for w in words if not w.startswith(("enc", "dec")))
        return "it has: " + ", ".join(listed) if listed else ""


def _overlap(site: Site, other: Site) -> bool:
    """Whether two sites have rows of one weight in common."""
    if site.weight != other.weight:
        return False
    return site.rows is None or other.rows is None or bool({*site.rows.indices()} & {*other.rows.indices()})


def _named(term: Term, site: Site) -> bool:
    """Whether a term selects a site; a pattern that names a container names what is in it."""
    if term.kind == "role":
        return term.text in site.roles
    if site.shared:  # one adapter for two modules is asked for by its word: a path means the module
        return False
    if term.kind == "glob":
        return any(fnmatch.fnmatchcase(path, term.text) for path in upwards(site.weight))
    return any(re.fullmatch(term.text, path) for path in upwards(site.weight))
