"""The syntax tree of a spec, and its one canonical spelling.

Every node is frozen and remembers which characters of the source it came from; spans and the source take no
part in equality, so `parse(str(spec)) == spec`.  This module does not read text (`rewrite.parser`), knows no
method (`rewrite.bind`) and no model.

What is parsed holds aliases (`Spec.lets`, terms of kind `alias`); binding replaces them by what they stand for,
and only then there are terms of kind `group`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

ROLES = (
    *("linear", "conv", "norm", "embed", "head", "base", "block", "blocks", "router", "tied", "mixer", "input"),
    *("attn", "attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv"),
    *("cross", "cross.q", "cross.k", "cross.v", "cross.o", "cross.qkv"),
    *("ffn", "ffn.up", "ffn.gate", "ffn.down", "ffn.gate_up"),
    *("ffn.experts", "ffn.experts.up", "ffn.experts.gate", "ffn.experts.down"),
)
STACKS = ("enc", "dec", "text", "vision", "audio")
# Models call many things a mixer, so a spec may say which of them it means.
OPEN_ROLES = ("mixer",)
LET = "let"
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t"}

_PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def known_role(word: str) -> bool:
    """Whether `word` belongs to the site vocabulary, alone or inside one stack of a model that has several.

    >>> known_role("attn.q"), known_role("vision.attn.q"), known_role("q")
    (True, True, False)
    """
    stack, _, rest = word.partition(".")
    return word in (*ROLES, *STACKS) or (stack in STACKS and rest in ROLES)


def inherit(before: str, word: str) -> str:
    """The full name of a site word written right after the site word `before`.

    A word without a dot takes the prefix of a dotted word before it, unless only the bare word is known.

    >>> inherit("attn.q", "v"), inherit("enc.attn.q", "v"), inherit("attn.q", "head"), inherit("linear", "v")
    ('attn.v', 'enc.attn.v', 'head', 'v')
    """
    prefix, dot, _ = before.rpartition(".")
    full = f"{prefix}.{word}"
    if not dot or "." in word or (known_role(word) and not known_role(full)):
        return word
    return full


def role_of(name: str) -> str | None:
    """The role that is called `name` or ends in it, which an alias of that name would hide.

    >>> role_of("attn"), role_of("q"), role_of("experts"), role_of("mixer"), role_of("towers")
    ('attn', 'attn.q', 'ffn.experts', None, None)
    """
    words = () if name in OPEN_ROLES else (*STACKS, *ROLES)
    return next((word for word in words if word.rpartition(".")[2] == name), None)


class Span(NamedTuple):
    """Characters `start:stop` of the source."""

    start: int
    stop: int


NOWHERE = Span(0, 0)


@dataclass(frozen=True)
class Null:
    """The value `none`."""

    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True)
class Bool:
    """The value `true` or `false`."""

    value: bool
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return "true" if self.value else "false"


@dataclass(frozen=True)
class Int:
    """A whole number of at most 64 bits."""

    value: int
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Float:
    """A finite number, written by the shortest digits that give it back."""

    value: float
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Str:
    """A quoted string."""

    value: str
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return quoted(self.value)


@dataclass(frozen=True)
class Name:
    """A bare word as a value (`scale=rs`)."""

    value: str
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Tuple:
    """Values in parentheses."""

    items: tuple[Value, ...]
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.items))
        return f"({inside},)" if len(self.items) == 1 else f"({inside})"


@dataclass(frozen=True)
class Keyword:
    """`name=value` inside a call; the span covers the name, the value has its own."""

    name: str
    value: Value
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True)
class Call:
    """A name with arguments: a method, or a value that takes arguments of its own (`init=pissa(niter=4)`)."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: tuple[Keyword, ...] = ()
    span: Span = field(default=NOWHERE, compare=False)

    @property
    def name_span(self) -> Span:
        """The characters of the name alone."""
        return Span(self.span.start, self.span.start + len(self.name))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, (*self.args, *self.kwargs)))})"


Value: TypeAlias = Null | Bool | Int | Float | Str | Name | Tuple | Call


@dataclass(frozen=True)
class Layers:
    """A layer selector: a list of layer numbers, or (`indices is None`) a slice."""

    indices: tuple[int, ...] | None = None
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    span: Span = field(default=NOWHERE, compare=False)

    def select(self, count: int) -> list[int]:
        """The layers that are meant, of `count`: Python's slice and negative-index rules, each layer once.

        Raises `IndexError` for a single number out of range; a slice is cut to the range, as in Python.

        >>> Layers(start=-4).select(12), Layers(indices=(0, -1)).select(12)
        ([8, 9, 10, 11], [0, 11])
        """
        if self.indices is None:
            return list(range(count)[slice(self.start, self.stop, self.step)])
        for index in self.indices:
            if not -count <= index < count:
                raise IndexError(f"layer {index} is out of range: there are {count} layers")
        return list(dict.fromkeys(index % count for index in self.indices))

    def __str__(self) -> str:
        if self.indices is not None:
            return f"[{','.join(map(str, self.indices))}]"
        start, stop, step = ("" if n is None else str(n) for n in (self.start, self.stop, self.step))
        return f"[{start}:{stop}{':' + step if step else ''}]"


@dataclass(frozen=True)
class Term:
    """One site: a role word, a glob or a regex, with its layers; `minus` removes it from the terms before.

    An `alias` is a word that a `let` defines.  A `group` selects what `group` selects, whatever stands before
    it: what binding makes of an alias with a minus of its own.
    """

    kind: Literal["role", "glob", "regex", "alias", "group"]
    text: str
    layers: Layers | None = None
    minus: bool = False
    span: Span = field(default=NOWHERE, compare=False)
    group: Selector | None = None

    def __str__(self) -> str:
        return self.written("")

    def written(self, before: str, aliases: Collection[str] = ()) -> str:
        """The term without its minus, as short as it may be right after the site word `before`."""
        layers = "" if self.layers is None else str(self.layers)
        if self.kind == "glob":
            return quoted(self.text) + layers
        if self.kind == "regex":
            return "/" + self.text.replace("/", "\\/") + "/" + layers
        if self.kind == "alias":
            return self.text + layers
        if self.kind == "group":
            return f"({self.group})"
        short = self.text.rpartition(".")[2]
        plain = _PLAIN_WORD.fullmatch(short) is not None and short not in CONSTANTS and short not in aliases
        return (short if plain and inherit(before, short) == self.text else self.text) + layers

    def moved(self, span: Span, layers: Layers | None = None) -> Term:
        """The same term, written at `span`; `layers` narrows what it adds, which may not be narrowed yet."""
        narrow = None if self.minus else layers
        group = self.group and self.group.moved(span, narrow)
        own = self.layers if group or self.layers else narrow
        return replace(self, layers=own and replace(own, span=span), span=span, group=group)


@dataclass(frozen=True)
class Selector:
    """Terms read left to right: each adds its sites, or with `minus` removes them from everything so far."""

    terms: tuple[Term, ...]
    span: Span = field(default=NOWHERE, compare=False)

    def written(self, comma: str, aliases: Collection[str] = ()) -> str:
        """The terms with `comma` between them, `attn.q,v` for `attn.q,attn.v`."""
        text, before = "", ""
        for number, term in enumerate(self.terms):
            joint = "-" if term.minus else comma if number else ""
            text += joint + term.written(before, aliases)
            before = term.text if term.kind == "role" else ""
        return text

    def __str__(self) -> str:
        return self.written(",")

    def moved(self, span: Span, layers: Layers | None = None) -> Selector:
        """The same sites in these `layers`, written at `span`: what an error about any of them points at."""
        return Selector(tuple(term.moved(span, layers) for term in self.terms), span)

    def leaves(self, minus: bool = False) -> Iterator[Term]:
        """The terms that add sites, those of groups among them; with `minus` also those that remove some.

        >>> inner = Selector((Term("role", "linear"), Term("role", "head", minus=True)))
        >>> sites = Selector((Term("role", "norm"), Term("group", "most", group=inner)))
        >>> [term.text for term in sites.leaves()], [term.text for term in sites.leaves(minus=True)]
        (['norm', 'linear'], ['norm', 'linear', 'head'])
        """
        for term in self.terms:
            if minus or not term.minus:
                yield from term.group.leaves(minus) if term.group else (term,)


@dataclass(frozen=True)
class Let:
    """An alias: a name for sites, which the clauses and the aliases after it may use as a site.

    >>> print(Let("towers", Selector((Term("role", "vision"), Term("role", "text")))))
    let towers = vision,text;
    """

    name: str
    sites: Selector
    span: Span = field(default=NOWHERE, compare=False)
    name_span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return self.written(())

    def written(self, aliases: Collection[str]) -> str:
        """The definition, in a spec that defines all these `aliases`."""
        return f"{LET} {self.name} = {self.sites.written(',', aliases)};"


@dataclass(frozen=True)
class Clause:
    """One method and where it goes; `positional`: the sites were written in the parentheses."""

    call: Call
    sites: Selector | None = None
    positional: bool = False
    label: str | None = None
    approximate: bool = False
    span: Span = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return self.written(())

    def written(self, aliases: Collection[str]) -> str:
        """The clause, in a spec that defines all these `aliases`."""
        inside = [str(value) for value in self.call.args]
        sites = "" if self.sites is None else self.sites.written(", " if self.positional else ",", aliases)
        if sites and self.positional:
            inside.append(sites)
        inside += map(str, self.call.kwargs)
        head = (f"{self.label}: " if self.label is not None else "") + ("~" if self.approximate else "")
        tail = f"@{sites}" if sites and not self.positional else ""
        return f"{head}{self.call.name}{'(' + ', '.join(inside) + ')' if inside else ''}{tail}"


@dataclass(frozen=True)
class Spec:
    """A parsed spec: its clauses in the order written, the text they came from, and the aliases before them."""

    clauses: tuple[Clause, ...]
    source: str = field(default="", compare=False)
    lets: tuple[Let, ...] = ()

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names that it defines."""
        return tuple(let.name for let in self.lets)

    def __str__(self) -> str:
        aliases = frozenset(self.aliases)
        lets = "".join(f"{let.written(aliases)} " for let in self.lets)
        return lets + " + ".join(clause.written(aliases) for clause in self.clauses)

    def __iter__(self) -> Iterator[Clause]:
        return iter(self.clauses)


def quoted(text: str) -> str:
    """`text` in double quotes, with the escapes that the parser reads.

    >>> print(quoted('say "hi"'))
    "say \\"hi\\""
    """
    letters = {value: f"\\{letter}" for letter, value in ESCAPES.items() if letter != "'"}
    return '"' + "".join(letters.get(c, c) for c in text) + '"'
