"""The grammar: what is read, how it is printed, and that printing and reading are inverse."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewrite.errors import SpecError
from rewrite.lexer import MAX_INT, Lexer, regex_fault
from rewrite.parser import parse, parse_sites
from rewrite.spec import (
    CONSTANTS,
    LET,
    OPEN_ROLES,
    ROLES,
    STACKS,
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
    Spec,
    Str,
    Term,
    Tuple,
    inherit,
    known_role,
)

CANONICAL = {
    "lora@attn": "lora@attn",
    "lora()@attn": "lora@attn",
    "lora( r = 8 ) @ attn.q , v + nf4( base )": "lora(r=8)@attn.q,v + nf4(base)",
    "lora\n  (r=8, # rank\n   alpha=16)\r\n@attn.q,\n v # sites": "lora(r=8, alpha=16)@attn.q,v",
    "en:~lora@attn+fr : lora@ffn": "en: ~lora@attn + fr: lora@ffn",
    "~ lora@attn": "~lora@attn",
    "full(norm,head)": "full(norm, head)",
    "nf4(linear-head,double_quant=True)": "nf4(linear-head, double_quant=true)",
    "nf4(attn.q[0:8],v[8:],)": "nf4(attn.q[0:8], v[8:])",
    "lora@attn.q,attn.v": "lora@attn.q,v",
    "lora@enc.attn.q,v,dec.attn.q,v": "lora@enc.attn.q,v,dec.attn.q,v",
    "lora@'a.*.b',/x\\/y/": 'lora@"a.*.b",/x\\/y/',
    "lora@'say \"hi\"\\\\'": 'lora@"say \\"hi\\"\\\\"',
    "lora@attn[ 0 : 8 ],ffn[ : : 2 ],norm[-4:],embed[ 0,2 , -1 ],head[3]": (
        "lora@attn[0:8],ffn[::2],norm[-4:],embed[0,2,-1],head[3]"
    ),
    "a(x=1e-3,y=-.5,z=1.,w=-7,v=1e20,u=00)@b": "a(x=0.001, y=-0.5, z=1.0, w=-7, v=1e+20, u=0)@b",
    "a(x=None,y=False,z=rs,w='s',v=a.b)@b": 'a(x=none, y=false, z=rs, w="s", v=a.b)@b',
    "a(x=(),y=(1),z=(1,(2,'c'),),w=f(g(1),h=2),v=f())@b": ('a(x=(), y=(1,), z=(1, (2, "c")), w=f(g(1), h=2), v=f())@b'),
    "a(8,(1,),b(c=1),true,-2)": "a(8, (1,), b(c=1), true, -2)",
    "a(linear, 8, r=1)": "a(8, linear, r=1)",
    "let mixer='blocks.*.mixer';lora(r=8)@mixer": 'let mixer = "blocks.*.mixer"; lora(r=8)@mixer',
    "let a=attn.q , v-head;\nlet b = a [ 0:4],/x/ # two\n; nf4(linear-b,)": (
        "let a = attn.q,v-head; let b = a[0:4],/x/; nf4(linear-b)"
    ),
    "let x = attn.q; lora(init=x)@x,v + x(x(x), x)": "let x = attn.q; lora(init=x)@x,v + x(x(x), x)",
    "let mixer = /x/; lora@attn.q,attn.mixer,mixer": "let mixer = /x/; lora@attn.q,attn.mixer,mixer",
    "lora@attn.q,attn.mixer,mixer": "lora@attn.q,attn.mixer,mixer",
}


@pytest.mark.parametrize("name", ["errors", "spec", "lexer", "parser", "bind"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"rewrite.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_canonical_spelling(text: str, canonical: str) -> None:
    spec = parse(text)
    assert str(spec) == canonical
    assert parse(canonical) == spec
    assert spec.source == text


def test_the_tree() -> None:
    spec = parse("en: ~lora(r=8, init=pissa(niter=4))@attn.q[0:8],v-'*.3.*' + nf4(base, block=none)")
    init = Call("pissa", (), (Keyword("niter", Int(4)),))
    terms = (
        Term("role", "attn.q", Layers(None, 0, 8)),
        Term("role", "attn.v"),
        Term("glob", "*.3.*", minus=True),
    )
    lora = Call("lora", (), (Keyword("r", Int(8)), Keyword("init", init)))
    nf4 = Call("nf4", (), (Keyword("block", Null()),))
    assert spec == Spec(
        (
            Clause(lora, Selector(terms), positional=False, label="en", approximate=True),
            Clause(nf4, Selector((Term("role", "base"),)), positional=True),
        )
    )


def test_the_tree_of_an_alias() -> None:
    spec = parse("let a = linear-head; let b = norm,a; lora@attn.q,a[0:4],v-b")
    minus_head = Term("role", "head", minus=True)
    assert spec.lets == (
        Let("a", Selector((Term("role", "linear"), minus_head))),
        Let("b", Selector((Term("role", "norm"), Term("alias", "a")))),
    )
    assert spec.aliases == ("a", "b")
    assert spec.clauses[0].sites == Selector(
        (
            *(Term("role", "attn.q"), Term("alias", "a", Layers(None, 0, 4))),
            *(Term("role", "v"), Term("alias", "b", minus=True)),
        )
    )
    assert spec != parse(str(spec).replace("norm,a", "norm,linear"))


def test_spans_of_an_alias() -> None:
    text = " let a = attn.q , v ; lora@ a[0:4]"
    spec = parse(text)
    (let,) = spec.lets
    (term,) = (clause.sites.terms[0] for clause in spec.clauses if clause.sites)
    spans = (let.span, let.name_span, let.sites.span, let.sites.terms[1].span, term.span)
    assert [text[slice(*span)] for span in spans] == ["let a = attn.q , v ;", "a", "attn.q , v", "v", "a[0:4]"]


def test_without_a_let_a_word_is_a_role() -> None:
    (word,) = parse("lora@mixer").clauses[0].sites.terms  # pyright: ignore[reportOptionalMemberAccess]
    (alias,) = parse("let mixer = 'x'; lora@mixer").clauses[0].sites.terms  # pyright: ignore[reportOptionalMemberAccess]
    assert (word.kind, alias.kind) == ("role", "alias")


def test_value_kinds() -> None:
    call = parse("a(i=1, f=1e0, t=true, n=none, w=rs, s='rs', p=(1, 2), c=f(1))@b").clauses[0].call
    assert [keyword.value for keyword in call.kwargs] == [
        *(Int(1), Float(1.0), Bool(True), Null(), Name("rs"), Str("rs")),
        *(Tuple((Int(1), Int(2))), Call("f", (Int(1),))),
    ]


def test_int_float_and_bool_are_different_values() -> None:
    assert len({Int(1), Float(1.0), Bool(True)}) == 3


def test_spans_are_the_characters_written() -> None:
    text = "en: ~lora(r=8, init=pissa(niter=4))@attn.q[0:8], v - head"
    clause = parse(text).clauses[0]
    assert clause.sites is not None

    def at(node: Any) -> str:
        return text[node.span.start : node.span.stop]

    r, init = clause.call.kwargs
    assert (at(clause), at(clause.call)) == (text, "lora(r=8, init=pissa(niter=4))")
    assert (at(r), at(r.value), at(init.value)) == ("r", "8", "pissa(niter=4)")
    assert [at(term) for term in clause.sites.terms] == ["attn.q[0:8]", "v", "head"]
    assert [at(term.layers) for term in clause.sites.terms if term.layers] == ["[0:8]"]
    assert at(clause.sites) == "attn.q[0:8], v - head"
    assert text[slice(*clause.call.name_span)] == "lora"


def test_spans_take_no_part_in_equality() -> None:
    assert parse("  lora( r = 8 )@attn") == parse("lora(r=8)@attn")
    assert parse("lora(r=8)@attn") != parse("lora(r=8)@ffn")


@pytest.mark.parametrize(
    ("sites", "expected"),
    {
        "attn.q,v": "attn.q attn.v",
        "attn.q,v,o": "attn.q attn.v attn.o",
        "attn.q[0:8],v[8:]": "attn.q attn.v",
        "attn.q-v": "attn.q -attn.v",
        "attn.q,head": "attn.q head",
        "attn.q,head,v": "attn.q head v",
        "attn.q,norm,ffn.up,gate,down": "attn.q norm ffn.up ffn.gate ffn.down",
        "attn.q,'x',v": "attn.q x v",
        "attn.q,/x/,v": "attn.q x v",
        "attn.q,thing": "attn.q attn.thing",
        "enc.attn.q,v": "enc.attn.q enc.attn.v",
        "cross.q,attn": "cross.q attn",
        "linear-attn.q,v": "linear -attn.q attn.v",
        "layers.0,mlp": "layers.0 layers.mlp",
        "q,v": "q v",
        "ffn.experts.gate,up,down": "ffn.experts.gate ffn.experts.up ffn.experts.down",
        "ffn.gate,experts,gate_up": "ffn.gate ffn.experts ffn.gate_up",
        "vision.attn.q,v,text.attn.q,k": "vision.attn.q vision.attn.v text.attn.q text.attn.k",
        "enc.attn,mixer,audio": "enc.attn enc.mixer audio",
        "cross.q,qkv,attn.o,mixer": "cross.q cross.qkv attn.o mixer",
    }.items(),
)
def test_a_word_inherits_the_prefix_before_it(sites: str, expected: str) -> None:
    after = parse(f"lora@{sites}").clauses[0].sites
    inside = parse(f"nf4({sites})").clauses[0].sites
    assert after == inside == parse_sites(sites)
    assert after is not None
    assert " ".join("-" * term.minus + term.text for term in after.terms) == expected


@pytest.mark.parametrize(
    ("sites", "expected"),
    {
        "attn.q,low,v": "attn.q low v",
        "enc.attn,mixer": "enc.attn mixer",
        "enc.attn,enc.mixer": "enc.attn enc.mixer",
        "attn.q,attn.low": "attn.q attn.low",
        "linear-low-mixer": "linear -low -mixer",
        "'low',low": "low low",
    }.items(),
)
def test_an_alias_inherits_no_prefix(sites: str, expected: str) -> None:
    head = "let low = /x/; let mixer = low; "
    after = parse(f"{head}lora@{sites}").clauses[0].sites
    inside = parse(f"{head}nf4({sites})").clauses[0].sites
    assert after is not None
    assert after == inside
    assert " ".join("-" * term.minus + term.text for term in after.terms) == expected
    assert all((term.kind == "alias") == (term.text in ("low", "mixer")) for term in after.terms[1:])


def test_an_argument_between_two_sites_ends_the_inheritance() -> None:
    sites = parse("nf4(attn.q, 8, v)").clauses[0].sites
    assert sites is not None
    assert [term.text for term in sites.terms] == ["attn.q", "v"]


@pytest.mark.parametrize(
    "word",
    [*ROLES, "enc", "dec", "enc.attn.q", "dec.cross.v", "enc.norm", *STACKS, "vision.attn.q", "text.ffn.experts.up"],
)
def test_known_roles(word: str) -> None:
    assert known_role(word)


@pytest.mark.parametrize("word", ["q", "attn.z", "enc.z", "enc.", "encattn", "", "mlp", "enc.enc.attn", "experts"])
def test_unknown_roles(word: str) -> None:
    assert not known_role(word)


@pytest.mark.parametrize(
    ("selector", "expected"),
    {
        "[3]": [3],
        "[-1]": [11],
        "[0,2,-1,2,11]": [0, 2, 11],
        "[0:8]": list(range(8)),
        "[-4:]": [8, 9, 10, 11],
        "[::5]": [0, 5, 10],
        "[::-5]": [11, 6, 1],
        "[10:99]": [10, 11],
        "[8:4]": [],
        "[:]": list(range(12)),
    }.items(),
)
def test_layers_follow_python(selector: str, expected: list[int]) -> None:
    layers = parse_sites(f"attn{selector}").terms[0].layers
    assert layers is not None
    assert layers.select(12) == expected


@pytest.mark.parametrize("index", [12, -13, MAX_INT])
def test_a_layer_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=f"layer {index} is out of range: there are 12 layers"):
        Layers((0, index)).select(12)


@pytest.mark.parametrize("text", ["attn ffn", "attn + ffn", "", "attn@ffn"])
def test_parse_sites_reads_only_sites(text: str) -> None:
    with pytest.raises(SpecError):
        parse_sites(text)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*\.)?layers\.\d+\..*(q|k|v)_proj",
        r"(?:model|base)\.[^.]+\.(?=mlp)\w+",
        r"[]|*+]+",
        r"\(*",
        r"(a)?(b)?",
        r"a{2,3}",
        r"(ab)+",
    ],
)
def test_ordinary_regexes_pass(pattern: str) -> None:
    assert regex_fault(pattern) is None


@pytest.mark.parametrize("pattern", [r"((a?)b)*", r"(a|b){2}", r"(a{2})+", r"(\w+\.?)*x", r"(?:(?:x|y))+z"])
def test_repeats_that_multiply_are_refused(pattern: str) -> None:
    assert regex_fault(pattern) is not None


WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(lambda word: word not in (*CONSTANTS, LET))
ROLE_WORDS = st.sampled_from([*ROLES, "enc.attn.q", "dec.ffn.up", "layers.0.mlp", "mlp", "attn.true", "a.b", "q"])
VALUE_WORDS = WORDS.filter(lambda word: word.lower() not in ("nan", "inf", "infinity"))
TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" \n\t\"'\\/#"), max_size=8)
INTS = st.integers(-MAX_INT, MAX_INT)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
ATOMS = st.one_of(
    *(INTS.map(Int), FLOATS.map(Float), st.booleans().map(Bool), st.just(Null())),
    *(TEXTS.map(Str), VALUE_WORDS.map(Name)),
)


def calls(values: st.SearchStrategy[Any], args: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    kwargs = st.lists(st.builds(Keyword, WORDS, values), max_size=3, unique_by=lambda keyword: keyword.name)
    return st.builds(Call, WORDS, st.lists(args, max_size=2).map(tuple), kwargs.map(tuple))


VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3).map(lambda items: Tuple(tuple(items))) | calls(inner, inner),
    max_leaves=6,
)
BOUNDS = st.none() | INTS
LAYERS = st.none() | st.one_of(
    st.lists(INTS, min_size=1, max_size=3).map(lambda indices: Layers(tuple(indices))),
    st.builds(Layers, st.none(), BOUNDS, BOUNDS, BOUNDS.filter(lambda step: step != 0)),
)
NAMES = [*OPEN_ROLES, "low", "B", "attn_q", "_", "lets"]
REGEXES = st.sampled_from(["a/b", "a\\\\/b", "[/]+", r"\d+\.x", ".*(q|k)"])
TERMS = st.one_of(
    st.builds(Term, st.just("role"), ROLE_WORDS | st.sampled_from(NAMES), LAYERS, st.booleans()),
    st.builds(Term, st.just("glob"), TEXTS.filter(bool), LAYERS, st.booleans()),
    st.builds(Term, st.just("regex"), REGEXES, LAYERS, st.booleans()),
)


def selector(terms: list[Term], aliases: list[str]) -> Selector:
    """The terms as the parser has them: the first adds, and a bare word is an alias or has its inherited name."""
    kept: list[Term] = []
    for term in terms:
        kind, text = term.kind, term.text
        before = kept[-1].text if kept and kept[-1].kind == "role" else ""
        if kind == "role" and text in aliases:
            kind = "alias"
        elif kind == "role":
            text = inherit(before, text)
        kept.append(Term(kind, text, term.layers, term.minus and bool(kept)))
    return Selector(tuple(kept))


SITES = st.lists(TERMS, min_size=1, max_size=4)


@st.composite
def clauses(draw: st.DrawFn) -> Clause:
    sites = draw(st.none() | SITES.map(lambda terms: selector(terms, [])))
    # Between the parentheses of a clause a bare word or a string would be a site.
    values = VALUES.filter(lambda value: not isinstance(value, Name | Str))
    return Clause(
        draw(calls(VALUES, values)),
        sites,
        sites is not None and draw(st.booleans()),
        draw(st.none() | WORDS),
        draw(st.booleans()),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A spec with aliases: the words that they name are aliases in clauses, and in definitions behind theirs."""
    names, lets = draw(ALIASES), list[Let]()
    for at, name in enumerate(names):
        terms = [term for term in draw(SITES) if term.text not in names[at:]] or [Term("role", "linear")]
        lets.append(Let(name, selector(terms, names[:at])))
    items = [
        clause if clause.sites is None else replace(clause, sites=selector(list(clause.sites.terms), names))
        for clause in draw(CLAUSES)
    ]
    return Spec(tuple(items), lets=tuple(lets))


ALIASES = st.lists(st.sampled_from(NAMES), max_size=3, unique=True)
CLAUSES = st.lists(clauses(), min_size=1, max_size=3)
SPECS = specs()


@settings(deadline=None)
@given(SPECS)
def test_printing_and_parsing_are_inverse(spec: Spec) -> None:
    text = str(spec)
    assert parse(text) == spec
    assert str(parse(text)) == text


@settings(deadline=None)
@given(SPECS, st.data())
def test_blanks_and_comments_mean_nothing(spec: Spec, data: st.DataObject) -> None:
    lexer, pieces = Lexer(str(spec)), list[str]()
    blanks = st.sampled_from(["", "", " ", "\t", "\n", "\r\n", " # (+@ \u00e9\n"])
    while (token := lexer.next()).kind != "end":
        # Two words or numbers in a row occur only behind `let`, so nothing else merges where the blank is empty.
        pieces += [data.draw(blanks), token.text, " " * (token.text == LET)]
    assert parse("".join(pieces)) == spec


@settings(deadline=None)
@given(st.text())
@example("lora@\ud800")
@example("a(r=\u0663)@b")
@example("a@/[/")
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    check_is_spec_or_error(text)


PIECES = [
    "lora",
    "attn.q",
    "v",
    "r",
    "=",
    "(",
    ")",
    "[",
    "]",
    ",",
    ":",
    "+",
    "-",
    "~",
    "@",
    ";",
    "let",
    "let a =",
    "let mixer=a;",
    "8",
    "1e9",
    "0.5",
]
PIECES += [
    "'a'",
    '"',
    "'",
    "/a/",
    "/",
    "\\",
    "#",
    "\n",
    " ",
    "true",
    "none",
    "nan",
    ".",
    "*",
    "(a+)+",
    "?",
    "|",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_almost_specs_are_specs_or_spec_errors(text: str) -> None:
    check_is_spec_or_error(text)


def check_is_spec_or_error(text: str) -> None:
    error, spec = None, None
    try:
        spec = parse(text)
    except SpecError as caught:
        error = caught
    if error is None:
        assert spec is not None
        assert parse(str(spec)) == spec
    else:
        assert 0 <= error.start <= error.stop <= len(text)
        assert len(str(error).split("\n")) == 3
