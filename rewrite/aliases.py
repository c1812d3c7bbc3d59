"""What the aliases of a spec (`let name = sites;`) stand for, in terms that a resolver knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rewrite.errors import SpecError, nearest
from rewrite.lexer import brief
from rewrite.parser import MAX_DEPTH
from rewrite.spec import Selector, Span, Spec, Term, known_role

MAX_TERMS = 10_000  # that aliases may stand for: without a bound, fifteen short ones make 10^15


class Aliases:
    """What the aliases of a spec stand for, in terms that a resolver knows."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.known: dict[str, Selector] = {}
        self.depth: dict[str, int] = {}
        self.count = 0  # terms that aliases have become so far
        for let in spec.lets:
            self.known[let.name] = self.expand(let.sites)
            inside = [self.depth[term.text] for term in let.sites.terms if term.kind == "alias"]
            self.depth[let.name] = 1 + max(inside, default=0)
        self.used()

    def error(self, span: Span, message: str, hint: str = "") -> SpecError:
        return SpecError(message, self.spec.source, *span, hint)

    def expand(self, sites: Selector) -> Selector:
        """The same sites without aliases; errors about what they stand for point at the alias."""
        terms: list[Term] = []
        for term in sites.terms:
            terms += self.terms(term, not terms) if term.kind == "alias" else (term,)
        return replace(sites, terms=tuple(terms))

    def terms(self, term: Term, first: bool) -> Iterable[Term]:
        """The terms for an alias, whose own minuses must not reach what stands before it."""
        stands = self.stands(term).moved(term.span, term.layers)
        if not first and any(inner.minus for inner in stands.terms):
            return (Term("group", term.text, None, term.minus, term.span, stands),)
        return (replace(inner, minus=inner.minus or term.minus) for inner in stands.terms)

    def stands(self, term: Term) -> Selector:
        """What an alias stands for, checked for its place and its size."""
        name = brief(term.text)
        if term.text not in self.known:
            raise self.error(term.span, f"unknown alias '{name}'")
        leaves = list(self.known[term.text].leaves(minus=True))
        if term.layers and any(leaf.layers for leaf in leaves):
            raise self.error(term.layers.span, f"the alias '{name}' has layers of its own", f"write {name}")
        if self.depth[term.text] > MAX_DEPTH:
            raise self.error(term.span, f"aliases are nested more than {MAX_DEPTH} deep")
        self.count += len(leaves)
        if self.count > MAX_TERMS:
            raise self.error(term.span, f"the aliases stand for more than {MAX_TERMS:,} sites")
        return self.known[term.text]

    def used(self) -> None:
        """Check that every alias is used: one that is not was misspelt, or stands for nothing."""
        selectors = [let.sites for let in self.spec.lets]
        selectors += [clause.sites for clause in self.spec.clauses if clause.sites]
        terms = [term for selector in selectors for term in selector.terms]
        names = {term.text for term in terms if term.kind == "alias"}
        for let in self.spec.lets:
            if let.name in names:
                continue
            words = [term.text for term in terms if term.kind == "role" and not known_role(term.text)]
            close = nearest(let.name, (word.rpartition(".")[2] for word in words), 1)
            hint = f"'{brief(close[0])}' is no site: did you mean '{brief(let.name)}'?" if close else ""
            raise self.error(let.name_span, f"the alias '{brief(let.name)}' is never used", hint)
