"""Syntax tree -> method instances: types, defaults, sites, canonical spelling (errors: test_spec_errors)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.bind import arguments, bind, canonical
from rewrite.errors import SpecError
from rewrite.method import arg
from rewrite.parser import parse
from rewrite.spec import Selector, Spec


@dataclass(frozen=True)
class Zero:
    """A choice without arguments."""


@dataclass(frozen=True)
class Svd:
    """A choice with arguments."""

    niter: int = arg(2, low=0, help="power iterations")
    scale: float | None = arg(None, above=0)


START = arg(Zero(), choices={"zero": Zero, "svd": Svd}, help="where training starts")


@dataclass(frozen=True)
class Lora:
    """One argument of every kind."""

    r: int = arg(8, low=1, high=1024, help="rank")
    alpha: float | None = arg(None, above=0)
    drop: float = arg(0.0, low=0, below=1)
    bias: bool = arg(False)
    name: str = arg("")
    act: str = arg("relu", choices=("relu", "gelu"))
    mode: Literal["auto", "rs", 2] = arg("auto")
    gain: int | float | str = arg(1)
    dims: tuple[int, ...] = arg((), low=1)
    pair: tuple[int, float] = arg((1, 1.0))
    start: Zero | Svd = START
    plain: int = 3
    made: tuple[int, ...] = field(default_factory=tuple)
    hidden: int = field(default=5, init=False)


@dataclass(frozen=True)
class Nf4:
    """Sites in the parentheses."""

    positional_sites: ClassVar[bool] = True
    block: int = arg(64, low=16)
    double_quant: bool = arg(False)


@dataclass(frozen=True)
class Full:
    """Sites of its own."""

    default_sites: ClassVar[str | None] = "norm-head[-2:]"


METHODS = {"lora": Lora, "nf4": Nf4, "full": Full}


def one(text: str) -> Any:
    (bound,) = bind(parse(text), METHODS)
    return bound.method


def test_defaults() -> None:
    assert one("lora@attn") == Lora()
    assert one("lora()@attn") == Lora()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("r=4", "r", 4),
        ("r=1", "r", 1),
        ("r=1024", "r", 1024),
        ("alpha=16", "alpha", 16.0),
        ("alpha=1e-3", "alpha", 0.001),
        ("alpha=none", "alpha", None),
        ("drop=0", "drop", 0.0),
        ("drop=.999", "drop", 0.999),
        ("bias=true", "bias", True),
        ("bias=False", "bias", False),
        ("name=word", "name", "word"),
        ("name='two words'", "name", "two words"),
        ("act=gelu", "act", "gelu"),
        ("act='gelu'", "act", "gelu"),
        ("mode=rs", "mode", "rs"),
        ("mode='rs'", "mode", "rs"),
        ("mode=2", "mode", 2),
        ("gain=2", "gain", 2),
        ("gain=2.0", "gain", 2.0),
        ("gain=max", "gain", "max"),
        ("dims=()", "dims", ()),
        ("dims=(1, 2, 3)", "dims", (1, 2, 3)),
        ("pair=(2, 3)", "pair", (2, 3.0)),
        ("start=zero", "start", Zero()),
        ("start=svd", "start", Svd()),
        ("start=svd()", "start", Svd()),
        ("start='svd'", "start", Svd()),
        ("start=svd(niter=4, scale=2)", "start", Svd(4, 2.0)),
        ("plain=-7", "plain", -7),
        ("made=(1,)", "made", (1,)),
    ],
)
def test_argument_values(text: str, name: str, value: object) -> None:
    found = getattr(one(f"lora({text})@attn"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "r=true",
        "r=1.0",
        "r=none",
        "r=1025",
        "drop=true",
        "drop=1",
        "drop=-0.1",
        "mode=3",
        "mode=true",
        "mode=2.0",
        "gain=true",
        "gain=none",
        "dims=(1.0,)",
        "dims=(true,)",
        "dims=(0,)",
        "pair=(1, 2, 3)",
        "pair=1",
        "start=none",
        "start=svd(niter=-1)",
        "start=svd(scale=0)",
        "start=Zero",
        "hidden=5",
        "bias=yes",
    ],
)
def test_values_that_do_not_fit(text: str) -> None:
    with pytest.raises(SpecError):
        bind(parse(f"lora({text})@attn"), METHODS)


def test_one_bound_per_clause_in_order() -> None:
    bound = bind(parse("en: ~lora(r=4)@attn + nf4(base) + lora@ffn"), METHODS)
    assert [b.method for b in bound] == [Lora(r=4), Nf4(), Lora()]
    assert [str(b.sites) for b in bound] == ["attn", "base", "ffn"]
    assert (bound[0].clause.label, bound[0].clause.approximate) == ("en", True)


def test_sites_may_stand_in_either_place() -> None:
    for text in ("lora(attn.q, v, r=4)", "lora(r=4)@attn.q,v"):
        (bound,) = bind(parse(text), METHODS)
        assert (bound.method, str(bound.sites)) == (Lora(r=4), "attn.q,v")
    assert str(bind(parse("nf4@base-head"), METHODS)[0].sites) == "base-head"


def test_default_sites_have_the_span_of_the_name() -> None:
    (bound,) = bind(parse("a: full"), METHODS)
    head = bound.sites.terms[1]
    assert (str(bound.sites), head.minus) == ("norm-head[-2:]", True)
    assert head.layers is not None
    assert {bound.sites.span, head.span, head.layers.span} == {(3, 7)}


def test_written_sites_replace_the_default() -> None:
    assert str(bind(parse("full@embed"), METHODS)[0].sites) == "embed"


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "lora(alpha=16, r=4)@attn.q,v": "lora(r=4, alpha=16)@attn.q,v",
        "lora(attn.q, v, alpha=16, r=8)": "lora(r=8, alpha=16)@attn.q,v",
        "nf4@linear-head": "nf4(linear-head)",
        "nf4(double_quant=true, block=32)@attn.q[0:8],v": "nf4(attn.q[0:8], v, block=32, double_quant=true)",
        "lora(start=svd(scale=1, niter=4))@attn": "lora(start=svd(niter=4, scale=1))@attn",
        "lora(start=svd())@attn": "lora(start=svd())@attn",
        "b: ~full + a: full(norm)": "b: ~full + a: full@norm",
        "let m='*.m';let n=m,head; nf4@n[0:2] + lora(r=4,alpha=2)@m": (
            'let m = "*.m"; let n = m,head; nf4(n[0:2]) + lora(r=4, alpha=2)@m'
        ),
    }.items(),
)
def test_canonical(text: str, expected: str) -> None:
    spec = parse(text)
    assert canonical(spec, METHODS) == expected
    again = parse(expected)
    assert canonical(again, METHODS) == expected
    assert [(b.method, b.sites) for b in bind(again, METHODS)] == [(b.method, b.sites) for b in bind(spec, METHODS)]


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "let m = 'b.*.m'; lora@m": '"b.*.m"',
        "let m = attn.q,/x/[0:2]; lora@head,m,v": "head,attn.q,/x/[0:2],v",
        "let m = attn,ffn; lora@linear-m": "linear-attn-ffn",
        "let m = attn,ffn; lora@norm,m[0:4]": "norm,attn[0:4],ffn[0:4]",
        "let m = attn,ffn; lora@linear-m[::2]": "linear-attn[::2]-ffn[::2]",
        "let m = linear-head; lora@m,norm": "linear-head,norm",
        "let m = linear-head; lora@m[0:2]": "linear[0:2]-head",
        "let m = linear-head; lora@block,m": "block,(linear-head)",
        "let m = linear-head; lora@block-m": "block-(linear-head)",
        "let m = linear-head; let n = norm,m; lora@n[3]": "norm[3],(linear[3]-head)",
        "let m = linear-head; let n = block-m; lora@attn.q,n[3]": "attn.q,(block[3]-(linear-head))",
        "let m = linear-head; let n = m; let p = n; lora@p-p": "linear-head-(linear-head)",
        "let mixer = 'm'; lora@attn.q,enc.mixer,mixer": 'attn.q,enc.mixer,"m"',
    }.items(),
)
def test_an_alias_becomes_what_it_stands_for(text: str, expected: str) -> None:
    (bound,) = bind(parse(text), METHODS)
    assert str(bound.sites) == expected
    assert {term.kind for term in bound.sites.leaves(minus=True)} <= {"role", "glob", "regex"}


def test_what_an_alias_stands_for_has_the_span_of_its_use() -> None:
    text = "let m = linear-head; let n = attn,m; lora@n + lora@block,n[0:2]-m"
    first, second = (bound.sites for bound in bind(parse(text), METHODS))
    spans = [(term.text, text[slice(*term.span)]) for term in second.leaves(minus=True)]
    assert spans == [("block", "block"), ("attn", "n[0:2]"), *[(w, "n[0:2]") for w in ("linear", "head")]] + [
        (w, "m") for w in ("linear", "head")
    ]
    assert {text[slice(*term.layers.span)] for term in second.leaves() if term.layers} == {"n[0:2]"}
    assert {term.span.start for term in first.leaves(minus=True)} == {text.index("lora@n") + len("lora@")}


def test_aliases_in_a_tree_without_a_source() -> None:
    spec = parse("let m = attn; lora@m")
    assert bind(Spec(spec.clauses, lets=spec.lets), METHODS)[0].sites == parse("lora@attn").clauses[0].sites
    with pytest.raises(SpecError, match="unknown alias 'm'"):
        bind(Spec(spec.clauses), METHODS)


def selected(sites: Selector, known: dict[str, set[int]]) -> set[int]:
    """What a selector means, where each word in `known` is a set of places and the layer of a place is itself."""
    chosen: set[int] = set()
    for term in sites.terms:
        found = selected(term.group, known) if term.group else known[term.text]
        if term.layers:
            found = found & set(term.layers.select(8))
        chosen = chosen - found if term.minus else chosen | found
    return chosen


@settings(deadline=None)
@given(st.data())
def test_binding_keeps_what_aliases_select(data: st.DataObject) -> None:
    known = {word: data.draw(st.sets(st.integers(0, 7))) for word in ("norm", "head", "embed")}
    plain, lets, layered, used = list(known), "", set[str](), set[str]()

    def sites() -> str:
        text = ""
        for word in data.draw(st.lists(st.sampled_from(plain + sorted(layered)), min_size=1, max_size=4)):
            narrow = data.draw(st.sampled_from(["", "[0:4]", "[::2]"])) if word not in layered else ""
            text += (data.draw(st.sampled_from([",", "-"])) if text else "") + word + narrow
            used.add(word)
        return text

    for name in ("one", "two", "three"):
        lets += f"let {name} = {sites()}; "
        inside = parse(lets + "lora@norm").lets[-1].sites
        known[name] = selected(inside, known)
        (layered.add if any(t.layers or t.text in layered for t in inside.terms) else plain.append)(name)
    text = ",".join([sites(), *sorted({"one", "two", "three"} - used)])
    spec = parse(f"{lets}lora@{text}")
    (bound,) = bind(spec, METHODS)
    assert spec.clauses[0].sites is not None
    assert selected(bound.sites, known) == selected(spec.clauses[0].sites, known)


def test_canonical_refuses_what_bind_refuses() -> None:
    with pytest.raises(SpecError, match="unknown method 'lorra'"):
        canonical(parse("lorra@attn"), METHODS)


ARGUMENTS = {
    "r": st.integers(1, 1024).map(str),
    "alpha": st.sampled_from(["none", "1e-9", "16", "2.5"]),
    "bias": st.sampled_from(["true", "False"]),
    "name": st.sampled_from(["x", "'y z'", '"\\""']),
    "dims": st.lists(st.integers(1, 9), max_size=3).map(lambda items: f"({', '.join(map(str, items))})"),
    "start": st.sampled_from(["zero", "zero()", "svd(scale=2, niter=3)", "'svd'"]),
}


@settings(deadline=None)
@given(st.data())
def test_random_arguments_survive_canonical_spelling(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(ARGUMENTS)), unique=True))
    inside = ", ".join(f"{name}={data.draw(ARGUMENTS[name])}" for name in names)
    spec = parse(data.draw(st.sampled_from([f"lora({inside})@attn.q,v", f"lora(attn.q, v, {inside})"])))
    text = canonical(spec, METHODS)
    assert bind(parse(text), METHODS)[0].method == bind(spec, METHODS)[0].method
    assert canonical(parse(text), METHODS) == text


def test_arguments_describe_the_fields() -> None:
    table = {argument.name: argument for argument in arguments(Lora)}
    assert list(table) == "r alpha drop bias name act mode gain dims pair start plain made".split()
    assert (table["r"].wants, table["r"].default, table["r"].help) == ("an int", 8, "rank")
    assert (table["r"].limits["low"], table["r"].limits["high"]) == (1, 1024)
    assert table["plain"].limits == {}
    assert table["made"].default == ()
    assert {name: table[name].wants for name in ("alpha", "act", "mode", "gain", "dims", "pair", "start")} == {
        "alpha": "a float or none",
        "act": "one of relu, gelu",
        "mode": "one of auto, rs, 2",
        "gain": "an int or a float or a string",
        "dims": "a tuple, each item an int",
        "pair": "a tuple (an int, a float)",
        "start": "one of zero, svd",
    }
    assert not any(argument.required for argument in table.values())


@dataclass(frozen=True)
class Whole:
    """A policy about the whole model."""

    eps: float = 1e-3
    kinds: ClassVar[frozenset[str]] = frozenset()


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("whole(eps=0.5)@attn", "whole is about the whole model, not about sites", "write whole(eps=0.5)"),
        ("x: whole", "whole is no adapter: it cannot be called 'x'", "write whole"),
    ],
)
def test_a_clause_about_the_whole_model_has_no_sites(text: str, message: str, fix: str):
    assert bind(parse("whole(eps=0.5)"), {"whole": Whole})[0].clause.sites is None
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        bind(parse(text), {"whole": Whole})
    assert fix in str(error.value)
