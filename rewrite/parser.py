"""Text -> syntax tree (`rewrite.spec`): the grammar of the spec language, in one place.

    spec    = { let } clause { "+" clause }
    let     = "let" word "=" sites ";"                        a name for sites, for what comes after it
    clause  = [ word ":" ] [ "~" ] word [ "(" [ item { "," item } [ "," ] ] ")" ] [ "@" sites ]
    item    = site { "-" site } | value | word "=" value      keyword arguments stand last
    sites   = site { "," site | "-" site }                    "," adds, "-" removes from everything before it
    site    = ( word | string | regex ) [ layers ]            attn.q,v means attn.q and attn.v
    layers  = "[" ( int { "," int } | [ int ] ":" [ int ] [ ":" [ int ] ] ) "]"
    value   = [ "-" ] number | "true" | "false" | "none" | word | string | tuple | call
    tuple   = "(" [ value { "," value } [ "," ] ] ")"
    call    = word "(" [ arg { "," arg } [ "," ] ] ")"
    arg     = value | word "=" value                          keyword arguments stand last

    word    = letter or "_", then letters, digits, "_"; parts joined by "."
    number  = 8 | 0.5 | .5 | 1e-3          string = "..." | '...'          regex = /.../ with \\/ for a slash
    blanks and newlines are free; "#" starts a comment that ends with its line

Between the parentheses of a clause a bare word, string or regex is a site (`nf4(base)`); inside a nested call,
after "=", and where sites follow an "@" (`save(fp8)@ffn`) a word is a value.  A site word that a `let` has defined is
that alias (`rewrite.bind` expands it).
Whether a method or an argument exists is not asked here.
"""

from __future__ import annotations

from typing import Literal

from rewrite.errors import SpecError
from rewrite.lexer import Lexer, Token, brief
from rewrite.spec import (
    CONSTANTS,
    LET,
    Bool,
    Call,
    Clause,
    Float,
    Int,
    Keyword,
    Layers,
    Let,
    Name,
    Null,
    Selector,
    Span,
    Spec,
    Str,
    Term,
    Tuple,
    Value,
    inherit,
    role_of,
)

MAX_LENGTH = 20_000
MAX_DEPTH = 50

_EXAMPLE = "write for example lora(r=8)@attn.q,v"
_MINUS = "'-' stands right behind what it removes from: linear-head"
_PLUS = "methods are joined by '+'"
_ENDS = {"(": _PLUS, ";": f"only a 'let' ends in ';': {_PLUS}"}
TWICE = "sites are written twice: in the parentheses and after '@'"
_LET = f"write for example {LET} mixer = 'blocks.*.mixer'; lora@mixer"
_NOT_NUMBERS = ("nan", "inf", "infinity")
_KINDS: dict[str, Literal["role", "glob", "regex", "alias"]] = {"word": "role", "string": "glob", "regex": "regex"}


def parse(text: str) -> Spec:
    """The syntax tree of a spec; `str()` of it is the canonical spelling and parses back to an equal tree.

    Raises `SpecError`, with a caret under the offending characters, for any text that is not a spec.

    >>> str(parse("lora( r = 8 ) @ attn.q, v+nf4(base)  # QLoRA"))
    'lora(r=8)@attn.q,v + nf4(base)'
    """
    if len(text) > MAX_LENGTH:
        raise SpecError(_too_long("", len(text)), text, MAX_LENGTH, len(text))
    spec = _Parser(text).spec()
    # Canonical text can be longer (1e15 -> 1000000000000000.0); without this bound it might not parse back.
    if len(text) > MAX_LENGTH // 8 and (length := len(str(spec))) > MAX_LENGTH:
        raise SpecError(_too_long(" in canonical spelling", length), text, 0, len(text))
    return spec


def parse_sites(text: str) -> Selector:
    """The selector that `text` would be after an `@`, e.g. a method's default sites.

    >>> [term.text for term in parse_sites("attn.q,v - head").terms]
    ['attn.q', 'attn.v', 'head']
    """
    parser = _Parser(text)
    selector = parser.sites("'@'")
    parser.expect("end", "the end of the sites")
    return selector


def _too_long(how: str, length: int) -> str:
    return f"the spec is {length:,} characters long{how}; the limit is {MAX_LENGTH:,}"


class _Parser:
    """Recursive descent with one token of lookahead, `self.token`: the first that no rule has taken yet."""

    def __init__(self, text: str) -> None:
        self.lexer = Lexer(text)
        self.depth = 0
        self.stop = 0  # where the last token that was taken ends
        self.aliases: set[str] = set()
        self.defining = ""  # the alias whose definition is being read
        self.words: dict[str, Span] = {}  # site words in definitions that were no alias, where first written
        self.token = self.lexer.next()

    def take(self) -> Token:
        token, self.stop = self.token, self.token.span.stop
        self.token = self.lexer.next()
        return token

    def accept(self, kind: str) -> Token | None:
        return self.take() if self.token.kind == kind else None

    def expect(self, kind: str, what: str, hint: str = "") -> Token:
        if self.token.kind != kind:
            raise self.wanted(what, hint)
        return self.take()

    def wanted(self, what: str, hint: str = "") -> SpecError:
        return self.lexer.error(*self.token.span, f"expected {what}, got {self.token}", hint)

    def span(self, start: Token) -> Span:
        """From `start` to the last token that was taken."""
        return Span(start.span.start, self.stop)

    def open(self) -> None:
        """Take an opening parenthesis; the bound keeps a hostile spec from exhausting the stack."""
        bracket = self.take()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.lexer.error(*bracket.span, f"parentheses are nested more than {MAX_DEPTH} deep")

    def close(self, what: str) -> None:
        self.expect(")", what)
        self.depth -= 1

    # --- clauses ---

    def spec(self) -> Spec:
        if self.token.kind == "end":
            raise self.lexer.error(*self.token.span, "the spec is empty", _EXAMPLE)
        lets: list[Let] = []
        while self.token.kind == "word" and self.token.text == LET:
            lets.append(self.let())
        clauses = [self.clause("a method after ';'" if lets else "a method")]
        while self.accept("+"):
            clauses.append(self.clause("a method after '+'"))
        if self.token.kind == "@" and clauses[-1].sites is not None:
            raise self.twice(clauses[-1], clauses[-1].sites.terms[0])
        self.expect("end", "'+' or the end of the spec", _ENDS.get(self.token.kind, ""))
        return Spec(tuple(clauses), self.lexer.source, tuple(lets))

    def let(self) -> Let:
        start = self.take()
        if self.token.kind != "word":
            raise self.wanted(f"a name after '{LET}'", _LET)
        self.free(self.token)
        name = self.take()
        self.expect("=", f"'=' after '{LET} {brief(name.text)}'")
        self.defining = name.text
        sites = self.sites("'='")
        self.defining = ""
        hint = "an alias names sites, not methods" if self.token.kind in ("(", "@") else f"a '{LET}' ends in ';'"
        self.expect(";", "',', '-' or ';'", hint)
        self.aliases.add(name.text)
        return Let(name.text, sites, self.span(start), name.span)

    def free(self, name: Token) -> None:
        """Check that an alias may have this name."""
        text = brief(name.text)
        if "." in name.text:
            raise self.lexer.error(*name.span, f"the alias '{text}' may not hold a dot")
        if name.text in CONSTANTS or name.text == LET:
            raise self.lexer.error(*name.span, f"'{text}' is a reserved word and cannot be an alias")
        if role := role_of(name.text):
            message = f"'{text}' is a role" if role == name.text else f"'{text}' is the short form of the role {role}"
            raise self.lexer.error(*name.span, f"{message} and cannot be an alias")
        if name.text in self.aliases:
            raise self.lexer.error(*name.span, f"the alias '{text}' is defined twice")
        if name.text in self.words:
            raise self.lexer.error(*self.words[name.text], f"the alias '{text}' is used before it is defined")

    def twice(self, clause: Clause, first: Term) -> SpecError:
        if not clause.positional:
            return self.lexer.error(*self.token.span, "only one '@' per clause")
        return self.lexer.error(*self.token.span, TWICE)

    def clause(self, what: str) -> Clause:
        start = self.token
        label = None
        if self.token.kind == "word":
            name = self.method("")
            if self.accept(":"):
                if "." in name.text:
                    raise self.lexer.error(*name.span, f"the label '{brief(name.text)}' may not hold a dot")
                label, name = name.text, None
        else:
            name = None
        approximate = name is None and self.accept("~") is not None
        if name is None:
            after = "a method after '~'" if approximate else f"a method after '{label}:'" if label else what
            name = self.method(after)
        values, terms, kwargs = self.items() if self.token.kind == "(" else ([], [], [])
        if self.token.kind == "@" and all(map(_bare, terms)):
            values += [Name(term.text, term.span) for term in terms]
            terms = []
        call = Call(name.text, tuple(values), tuple(kwargs), self.span(name))
        positional = bool(terms)
        sites = Selector(tuple(terms), Span(terms[0].span.start, terms[-1].span.stop)) if terms else None
        if sites is None and self.accept("@"):
            sites = self.sites("'@'")
        return Clause(call, sites, positional, label, approximate, self.span(start))

    def method(self, what: str) -> Token:
        """The word that a clause begins with."""
        if self.token.kind == "word" and self.token.text == LET:
            raise self.lexer.error(*self.token.span, f"a '{LET}' stands before the first method")
        return self.expect("word", what)

    def items(self) -> tuple[list[Value], list[Term], list[Keyword]]:
        """What stands between the parentheses of a clause."""
        values: list[Value] = []
        terms: list[Term] = []
        kwargs: list[Keyword] = []
        before = ""  # the site word right before, whose prefix the next one may inherit
        self.open()
        while self.token.kind != ")":
            token = self.token
            word = self.take() if token.kind == "word" else None
            if word and self.token.kind == "=":
                kwargs.append(self.keyword(word, kwargs))
            elif kwargs:
                raise self.late(token)
            elif (word and (self.token.kind == "(" or word.text in CONSTANTS)) or token.kind not in _KINDS:
                values.append(self.value("an argument or ')'", word, positional=True))
                before = ""
            else:
                terms.append(self.term(word or self.take(), before))
                before = self.removed(terms)
            if self.token.kind != ")" and not self.accept(","):
                raise self.wanted("',' or ')'")
        self.close("')'")
        return values, terms, kwargs

    # --- sites ---

    def sites(self, after: str) -> Selector:
        """A selector after an `@`: everything up to the end of the clause."""
        start, terms, before = self.token, list[Term](), ""
        while True:
            terms.append(self.term(self.site(after), before))
            before = self.removed(terms)
            if not self.accept(","):
                return Selector(tuple(terms), self.span(start))
            after = "','"

    def removed(self, terms: list[Term]) -> str:
        """Read the `-site`s that follow; the site word that now stands last."""
        while self.accept("-"):
            terms.append(self.term(self.site("'-'"), _word(terms[-1]), minus=True))
        return _word(terms[-1])

    def site(self, after: str) -> Token:
        if self.token.kind in _KINDS:
            return self.take()
        raise self.wanted(f"a site after {after}", _MINUS if self.token.kind == "-" else "")

    def term(self, token: Token, before: str, minus: bool = False) -> Term:
        kind, text = _KINDS[token.kind], str(token.value)
        if text in self.aliases and token.kind == "word":
            kind = "alias"
        elif token.kind == "word":
            text = self.role(token, before)
        elif not text:
            raise self.lexer.error(*token.span, "the glob is empty")
        layers = self.layers() if self.token.kind == "[" else None
        if self.token.kind == "[":
            raise self.lexer.error(*self.token.span, "a site takes only one layer selector")
        return Term(kind, text, layers, minus, self.span(token))

    def role(self, word: Token, before: str) -> str:
        if word.text in CONSTANTS:
            raise self.lexer.error(*word.span, f"'{word.text}' is a value, not a site")
        if word.text == self.defining:
            raise self.lexer.error(*word.span, f"the alias '{brief(word.text)}' is defined by itself")
        if self.defining:
            self.words.setdefault(word.text, word.span)
        return inherit(before, word.text)

    def layers(self) -> Layers:
        start = self.take()
        first = None if self.token.kind == ":" else self.layer("a layer number or ':'")
        if first is not None and self.token.kind in (",", "]"):
            indices = [first]
            while self.accept(","):
                indices.append(self.layer("a layer number"))
            self.expect("]", "',' or ']'")
            return Layers(tuple(indices), span=self.span(start))
        self.expect(":", "',', ':' or ']'")
        bounds: list[int | None] = [first]
        while True:
            bounds.append(None if self.token.kind in (":", "]") else self.layer("a layer number, ':' or ']'"))
            if len(bounds) == 3 or not self.accept(":"):
                break
        self.expect("]", "']'" if len(bounds) == 3 else "':' or ']'")
        low, high, step = (*bounds, None, None)[:3]
        if step == 0:
            raise self.lexer.error(*self.span(start), "the step of a layer selector may not be 0")
        return Layers(None, low, high, step, self.span(start))

    def layer(self, what: str) -> int:
        minus = self.accept("-")
        if self.token.kind != "number" or not isinstance(self.token.value, int):
            raise self.wanted("a layer number after '-'" if minus else what)
        value = self.take().value
        assert isinstance(value, int)
        return -value if minus else value

    # --- values ---

    def value(self, what: str, word: Token | None = None, positional: bool = False) -> Value:
        """A value; `word` is its first token where the caller had to look past it."""
        start = word or self.token
        if word or start.kind == "word":
            word = word or self.take()
            if self.token.kind == "(":
                args, kwargs = self.arguments()
                return Call(word.text, tuple(args), tuple(kwargs), self.span(word))
            return self.word_value(word)
        if start.kind == "string":
            return Str(str(self.take().value), start.span)
        if start.kind == "(":
            return self.tuple_value()
        if start.kind not in ("number", "-"):
            raise self.wanted(what, "a tuple is written (1, 2)" if start.kind == "[" else "")
        minus = self.accept("-")
        if minus and self.token.text.lower() in _NOT_NUMBERS:
            raise self.no_number(self.span(start)._replace(stop=self.token.span.stop))
        if minus and self.token.kind != "number":
            raise self.wanted("a number after '-'", _MINUS if positional and self.token.kind in _KINDS else "")
        number = self.take().value
        if isinstance(number, int):
            return Int(-number if minus else number, self.span(start))
        return Float(-float(number) if minus else float(number), self.span(start))

    def word_value(self, word: Token) -> Value:
        if word.text.lower() in _NOT_NUMBERS:
            raise self.no_number(word.span)
        if word.text not in CONSTANTS:
            return Name(word.text, word.span)
        constant = CONSTANTS[word.text]
        return Null(word.span) if constant is None else Bool(constant, word.span)

    def no_number(self, span: Span) -> SpecError:
        text = self.lexer.source[span.start : span.stop]
        return self.lexer.error(*span, f"'{text}' is not a number that an argument can be")

    def tuple_value(self) -> Tuple:
        start, items = self.token, list[Value]()
        self.open()
        while self.token.kind != ")":
            items.append(self.value("a value or ')'"))
            if self.token.kind != ")" and not self.accept(","):
                raise self.wanted("',' or ')'")
        self.close("')'")
        return Tuple(tuple(items), self.span(start))

    def arguments(self) -> tuple[list[Value], list[Keyword]]:
        """What stands between the parentheses of a nested call."""
        args: list[Value] = []
        kwargs: list[Keyword] = []
        self.open()
        while self.token.kind != ")":
            token = self.token
            word = self.take() if token.kind == "word" else None
            if word and self.token.kind == "=":
                kwargs.append(self.keyword(word, kwargs))
            elif kwargs:
                raise self.late(token)
            else:
                args.append(self.value("an argument or ')'", word))
            if self.token.kind != ")" and not self.accept(","):
                raise self.wanted("',' or ')'")
        self.close("')'")
        return args, kwargs

    def keyword(self, name: Token, before: list[Keyword]) -> Keyword:
        if any(keyword.name == name.text for keyword in before):
            raise self.lexer.error(*name.span, f"argument '{brief(name.text)}' is written twice")
        self.take()
        return Keyword(name.text, self.value(f"a value after '{brief(name.text)}='"), name.span)

    def late(self, token: Token) -> SpecError:
        if token.kind not in ("word", "string", "number", "regex", "-", "("):
            return self.wanted("an argument or ')'")
        return self.lexer.error(*token.span, f"{token} must stand before the keyword arguments")


def _bare(term: Term) -> bool:
    """Whether a site is written as one word, as a value may be."""
    return term.kind == "role" and "." not in term.text and term.layers is None and not term.minus


def _word(term: Term) -> str:
    return term.text if term.kind == "role" else ""
