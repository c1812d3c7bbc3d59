"""Every way to get a spec wrong, with the exact message; beside each the nearest spec that is right."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import pytest

from rewrite.bind import bind
from rewrite.errors import SpecError, caret, nearest
from rewrite.method import arg
from rewrite.parser import parse


@dataclass(frozen=True)
class Kaiming:
    """A choice without arguments."""


@dataclass(frozen=True)
class Pissa:
    """A choice with an argument, and a rule of its own."""

    niter: int | None = arg(None, low=1, high=64, help="power iterations")

    def __post_init__(self) -> None:
        if self.niter == 13:
            raise ValueError("niter may not be 13")


INIT = arg(Kaiming(), choices={"kaiming": Kaiming, "pissa": Pissa})


@dataclass(frozen=True)
class Lora:
    """One argument of every kind."""

    r: int = arg(8, low=1, help="rank")
    alpha: float | None = arg(None, above=0, help="numerator of the scale")
    drop: float = arg(0.0, low=0, below=1)
    scale: Literal["r", "rs"] = arg("r")
    bias: bool = arg(False)
    init: Kaiming | Pissa = INIT
    act: str = arg("relu", choices=("relu", "gelu"))
    dims: tuple[int, ...] = arg((), low=1)
    pair: tuple[int, float] = arg((1, 1.0))
    to: str = arg("")

    def check(self) -> str | None:
        """What no single argument can know."""
        return "bias and drop exclude each other" if self.bias and self.drop else None


@dataclass(frozen=True)
class Nf4:
    """A storage format: sites in the parentheses."""

    positional_sites: ClassVar[bool] = True
    block: int = arg(64, low=16)
    double_quant: bool = arg(False)


@dataclass(frozen=True)
class Full:
    """A method with sites of its own."""

    positional_sites: ClassVar[bool] = True
    default_sites: ClassVar[str] = "norm,head"


@dataclass(frozen=True)
class Prompt:
    """A method with an argument that must be given."""

    n: int


METHODS = {"lora": Lora, "nf4": Nf4, "full": Full, "prompt": Prompt}


class Case(NamedTuple):
    """A wrong spec, a right neighbour, and the three lines of the message."""

    bad: str
    good: str
    message: str
    line: str
    marks: str


CLAUSES = (
    Case(
        "",
        "lora(r=8)@attn.q",
        "the spec is empty",
        "  ",
        "  ^ write for example lora(r=8)@attn.q,v",
    ),
    Case(
        " \n\t ",
        "lora(r=8)@attn.q",
        "the spec is empty",
        "   ",
        "  ^ write for example lora(r=8)@attn.q,v",
    ),
    Case(
        "# only a comment",
        "lora(r=8)@attn.q # a comment",
        "the spec is empty",
        "  # only a comment",
        "  ^ write for example lora(r=8)@attn.q,v",
    ),
    Case(
        "+ lora@attn",
        "lora@attn",
        "expected a method, got '+'",
        "  + lora@attn",
        "  ^",
    ),
    Case(
        "lora@attn +",
        "lora@attn + nf4(base)",
        "expected a method after '+', got the end of the spec",
        "  lora@attn +",
        "             ^",
    ),
    Case(
        "lora@attn + + nf4(base)",
        "lora@attn + nf4(base)",
        "expected a method after '+', got '+'",
        "  lora@attn + + nf4(base)",
        "              ^",
    ),
    Case(
        "lora@attn nf4(base)",
        "lora@attn + nf4(base)",
        "expected '+' or the end of the spec, got 'nf4'",
        "  lora@attn nf4(base)",
        "            ^^^",
    ),
    Case(
        "@attn.q",
        "lora@attn.q",
        "expected a method, got '@'",
        "  @attn.q",
        "  ^",
    ),
    Case(
        "~~lora@attn",
        "~lora@attn",
        "expected a method after '~', got '~'",
        "  ~~lora@attn",
        "   ^",
    ),
    Case(
        "~ + lora@attn",
        "~lora@attn + lora@attn",
        "expected a method after '~', got '+'",
        "  ~ + lora@attn",
        "    ^",
    ),
    Case(
        "a.b: lora@attn",
        "a_b: lora@attn",
        "the label 'a.b' may not hold a dot",
        "  a.b: lora@attn",
        "  ^^^",
    ),
    Case(
        "en: fr: lora@attn",
        "en: lora@attn",
        "expected '+' or the end of the spec, got ':'",
        "  en: fr: lora@attn",
        "        ^",
    ),
    Case(
        "en:",
        "en: lora@attn",
        "expected a method after 'en:', got the end of the spec",
        "  en:",
        "     ^",
    ),
    Case(
        ": lora@attn",
        "en: lora@attn",
        "expected a method, got ':'",
        "  : lora@attn",
        "  ^",
    ),
    Case(
        "8(r=8)@attn",
        "lora(r=8)@attn.q",
        "expected a method, got '8'",
        "  8(r=8)@attn",
        "  ^",
    ),
    Case(
        "'lora'@attn",
        "lora@'attn'",
        "expected a method, got 'lora'",
        "  'lora'@attn",
        "  ^^^^^^",
    ),
    Case(
        "(lora)@attn",
        "lora()@attn",
        "expected a method, got '('",
        "  (lora)@attn",
        "  ^",
    ),
    Case(
        "lora@attn, nf4(base)",
        "lora@attn + nf4(base)",
        "expected '+' or the end of the spec, got '('",
        "  lora@attn, nf4(base)",
        "                ^ methods are joined by '+'",
    ),
)

PARENTHESES = (
    Case(
        "lora(r=8",
        "lora(r=8)@attn",
        "expected ',' or ')', got the end of the spec",
        "  lora(r=8",
        "          ^",
    ),
    Case(
        "lora(r=8\n\n  # the end",
        "lora(r=8\n\n)@attn # the end",
        "expected ',' or ')', got the end of the spec",
        "  lora(r=8",
        "          ^",
    ),
    Case(
        "lora(r=8))@attn",
        "lora(r=8)@attn",
        "expected '+' or the end of the spec, got ')'",
        "  lora(r=8))@attn",
        "           ^",
    ),
    Case(
        "lora(",
        "lora()@attn",
        "expected an argument or ')', got the end of the spec",
        "  lora(",
        "       ^",
    ),
    Case(
        "lora(r=8,",
        "lora(r=8,)@attn",
        "expected an argument or ')', got the end of the spec",
        "  lora(r=8,",
        "           ^",
    ),
    Case(
        "lora(,)@attn",
        "lora()@attn",
        "expected an argument or ')', got ','",
        "  lora(,)@attn",
        "       ^",
    ),
    Case(
        "lora(r=8 alpha=2)@attn",
        "lora(r=8, alpha=2)@attn",
        "expected ',' or ')', got 'alpha'",
        "  lora(r=8 alpha=2)@attn",
        "           ^^^^^",
    ),
    Case(
        "lora(r=8,,alpha=2)@attn",
        "lora(r=8, alpha=2,)@attn",
        "expected an argument or ')', got ','",
        "  lora(r=8,,alpha=2)@attn",
        "           ^",
    ),
    Case(
        "lora(r=)@attn",
        "lora(r=8)@attn.q",
        "expected a value after 'r=', got ')'",
        "  lora(r=)@attn",
        "         ^",
    ),
    Case(
        "lora(r==8)@attn",
        "lora(r=8)@attn.q",
        "expected a value after 'r=', got '='",
        "  lora(r==8)@attn",
        "         ^",
    ),
    Case(
        "lora(=8)@attn",
        "lora(r=8)@attn.q",
        "expected an argument or ')', got '='",
        "  lora(=8)@attn",
        "       ^",
    ),
    Case(
        "lora(r:8)@attn",
        "lora(r=8)@attn.q",
        "expected ',' or ')', got ':'",
        "  lora(r:8)@attn",
        "        ^",
    ),
    Case(
        "lora(r=8, r=4)@attn",
        "lora(r=8)@attn.q",
        "argument 'r' is written twice",
        "  lora(r=8, r=4)@attn",
        "            ^",
    ),
    Case(
        "nf4(block=32, base)",
        "nf4(base, block=32)",
        "'base' must stand before the keyword arguments",
        "  nf4(block=32, base)",
        "                ^^^^",
    ),
    Case(
        "lora(init=pissa(niter=4, 5))@attn",
        "lora(init=pissa(niter=4))@attn",
        "'5' must stand before the keyword arguments",
        "  lora(init=pissa(niter=4, 5))@attn",
        "                           ^",
    ),
    Case(
        "lora(init=pissa(niter=4)@attn",
        "lora(init=pissa(niter=4))@attn",
        "expected ',' or ')', got '@'",
        "  lora(init=pissa(niter=4)@attn",
        "                          ^",
    ),
    Case(
        "lora(dims=(1, 2)@attn",
        "lora(dims=(1, 2))@attn",
        "expected ',' or ')', got '@'",
        "  lora(dims=(1, 2)@attn",
        "                  ^",
    ),
    Case(
        "lora(dims=[1, 2])@attn",
        "lora(dims=(1, 2))@attn",
        "expected a value after 'dims=', got '['",
        "  lora(dims=[1, 2])@attn",
        "            ^ a tuple is written (1, 2)",
    ),
    Case(
        "lora(to=/a/)@attn",
        "lora(to='a')@attn",
        "expected a value after 'to=', got '/a/'",
        "  lora(to=/a/)@attn",
        "          ^^^",
    ),
    Case(
        "lora(r={8})@attn",
        "lora(r=8)@attn.q",
        "unexpected character '{'",
        "  lora(r={8})@attn",
        "         ^",
    ),
    Case(
        "lora(r=8;)@attn",
        "lora(r=8,)@attn",
        "expected ',' or ')', got ';'",
        "  lora(r=8;)@attn",
        "          ^",
    ),
)

NUMBERS = (
    Case(
        "lora(r=8x)@attn",
        "lora(r=8)@attn.q",
        "malformed number '8x'",
        "  lora(r=8x)@attn",
        "         ^^",
    ),
    Case(
        "lora(r=0x10)@attn",
        "lora(r=16)@attn",
        "malformed number '0x10'",
        "  lora(r=0x10)@attn",
        "         ^^^^",
    ),
    Case(
        "lora(r=1_000)@attn",
        "lora(r=1000)@attn",
        "malformed number '1_000'",
        "  lora(r=1_000)@attn",
        "         ^^^^^",
    ),
    Case(
        "lora(alpha=1.2.3)@attn",
        "lora(alpha=1.23)@attn",
        "malformed number '1.2.3'",
        "  lora(alpha=1.2.3)@attn",
        "             ^^^^^",
    ),
    Case(
        "lora(alpha=1e)@attn",
        "lora(alpha=1e2)@attn",
        "malformed number '1e'",
        "  lora(alpha=1e)@attn",
        "             ^^",
    ),
    Case(
        "lora(r=+8)@attn",
        "lora(r=8)@attn.q",
        "expected a value after 'r=', got '+'",
        "  lora(r=+8)@attn",
        "         ^",
    ),
    Case(
        "lora(r=--8)@attn",
        "lora(r=8)@attn.q",
        "expected a number after '-', got '-'",
        "  lora(r=--8)@attn",
        "          ^",
    ),
    Case(
        "lora(r=8/2)@attn",
        "lora(r=4)@attn",
        "the regex is not closed",
        "  lora(r=8/2)@attn",
        "          ^^^^^^^^ expected / on the same line",
    ),
    Case(
        "lora(alpha=1e999)@attn",
        "lora(alpha=1e99)@attn",
        "the number 1e999 is too large for a float",
        "  lora(alpha=1e999)@attn",
        "             ^^^^^",
    ),
    Case(
        "lora(alpha=1e-999)@attn",
        "lora(alpha=1e-99)@attn",
        "the number 1e-999 is too small for a float",
        "  lora(alpha=1e-999)@attn",
        "             ^^^^^^",
    ),
    Case(
        "lora(alpha=nan)@attn",
        "lora(alpha=none)@attn",
        "'nan' is not a number that an argument can be",
        "  lora(alpha=nan)@attn",
        "             ^^^",
    ),
    Case(
        "lora(alpha=-inf)@attn",
        "lora(alpha=1e308)@attn",
        "'-inf' is not a number that an argument can be",
        "  lora(alpha=-inf)@attn",
        "             ^^^^",
    ),
    Case(
        "lora(alpha=Infinity)@attn",
        "lora(alpha=1e308)@attn",
        "'Infinity' is not a number that an argument can be",
        "  lora(alpha=Infinity)@attn",
        "             ^^^^^^^^",
    ),
    Case(
        "lora(r=9223372036854775808)@attn",
        "lora(r=9223372036854775807)@attn",
        "the number 9223372036854775808 does not fit in 64 bits",
        "  lora(r=9223372036854775808)@attn",
        "         ^^^^^^^^^^^^^^^^^^^",
    ),
)

SITES = (
    Case(
        "lora@",
        "lora@attn",
        "expected a site after '@', got the end of the spec",
        "  lora@",
        "       ^",
    ),
    Case(
        "lora@@attn",
        "lora@attn",
        "expected a site after '@', got '@'",
        "  lora@@attn",
        "       ^",
    ),
    Case(
        "lora@attn@ffn",
        "lora@attn,ffn",
        "only one '@' per clause",
        "  lora@attn@ffn",
        "           ^",
    ),
    Case(
        "nf4(base)@linear",
        "nf4@linear",
        "sites are written twice: in the parentheses and after '@'",
        "  nf4(base)@linear",
        "           ^",
    ),
    Case(
        "lora(bias)@attn",
        "lora(bias=true)@attn",
        "sites are written twice: in the parentheses and after '@'",
        "  lora(bias)@attn",
        "            ^ an argument is written bias=...",
    ),
    Case(
        "lora@attn,",
        "lora@attn,ffn",
        "expected a site after ',', got the end of the spec",
        "  lora@attn,",
        "            ^",
    ),
    Case(
        "lora@attn,,ffn",
        "lora@attn,ffn",
        "expected a site after ',', got ','",
        "  lora@attn,,ffn",
        "            ^",
    ),
    Case(
        "lora@-head",
        "lora@linear-head",
        "expected a site after '@', got '-'",
        "  lora@-head",
        "       ^ '-' stands right behind what it removes from: linear-head",
    ),
    Case(
        "lora@linear,-head",
        "lora@linear-head",
        "expected a site after ',', got '-'",
        "  lora@linear,-head",
        "              ^ '-' stands right behind what it removes from: linear-head",
    ),
    Case(
        "lora@linear-",
        "lora@linear-head",
        "expected a site after '-', got the end of the spec",
        "  lora@linear-",
        "              ^",
    ),
    Case(
        "lora@linear--head",
        "lora@linear-head",
        "expected a site after '-', got '-'",
        "  lora@linear--head",
        "              ^ '-' stands right behind what it removes from: linear-head",
    ),
    Case(
        "nf4(-head)",
        "nf4(linear-head)",
        "expected a number after '-', got 'head'",
        "  nf4(-head)",
        "       ^^^^ '-' stands right behind what it removes from: linear-head",
    ),
    Case(
        "nf4(linear-4)",
        "nf4(linear[:4])",
        "expected a site after '-', got '4'",
        "  nf4(linear-4)",
        "             ^",
    ),
    Case(
        "lora@true",
        "lora@attn",
        "'true' is a value, not a site",
        "  lora@true",
        "       ^^^^",
    ),
    Case(
        "lora@8",
        "lora@attn",
        "expected a site after '@', got '8'",
        "  lora@8",
        "       ^",
    ),
    Case(
        "lora@(attn, ffn)",
        "lora@attn, ffn",
        "expected a site after '@', got '('",
        "  lora@(attn, ffn)",
        "       ^",
    ),
    Case(
        "lora@attn.",
        "lora@attn.q",
        "a name may not end in '.'",
        "  lora@attn.",
        "       ^^^^^",
    ),
    Case(
        "lora@.q",
        "lora@attn.q",
        "unexpected character '.'",
        "  lora@.q",
        "       ^",
    ),
    Case(
        "lora@attn..q",
        "lora@attn.q",
        "a name may not end in '.'",
        "  lora@attn..q",
        "       ^^^^^",
    ),
    Case(
        "lora@attn.*",
        "lora@'*attn.*'",
        "a name may not end in '.'",
        "  lora@attn.*",
        "       ^^^^^ a glob stands in quotes",
    ),
    Case(
        "lora@*",
        "lora@'*'",
        "unexpected character '*'",
        "  lora@*",
        "       ^ a glob stands in quotes",
    ),
    Case(
        "lora@''",
        "lora@'x'",
        "the glob is empty",
        "  lora@''",
        "       ^^",
    ),
    Case(
        "lora@//",
        "lora@/x/",
        "the regex is empty",
        "  lora@//",
        "       ^^",
    ),
)

LAYERS = (
    Case(
        "lora@attn[]",
        "lora@attn[:]",
        "expected a layer number or ':', got ']'",
        "  lora@attn[]",
        "            ^",
    ),
    Case(
        "lora@attn[",
        "lora@attn[0]",
        "expected a layer number or ':', got the end of the spec",
        "  lora@attn[",
        "            ^",
    ),
    Case(
        "lora@attn[0",
        "lora@attn[0]",
        "expected ',', ':' or ']', got the end of the spec",
        "  lora@attn[0",
        "             ^",
    ),
    Case(
        "lora@attn[0:8",
        "lora@attn[0:8]",
        "expected ':' or ']', got the end of the spec",
        "  lora@attn[0:8",
        "               ^",
    ),
    Case(
        "lora@attn[0:8:2",
        "lora@attn[0:8:2]",
        "expected ']', got the end of the spec",
        "  lora@attn[0:8:2",
        "                 ^",
    ),
    Case(
        "lora@attn[0,",
        "lora@attn[0,1]",
        "expected a layer number, got the end of the spec",
        "  lora@attn[0,",
        "              ^",
    ),
    Case(
        "lora@attn[1.5]",
        "lora@attn[1]",
        "expected a layer number or ':', got '1.5'",
        "  lora@attn[1.5]",
        "            ^^^",
    ),
    Case(
        "lora@attn[a]",
        "lora@attn[0]",
        "expected a layer number or ':', got 'a'",
        "  lora@attn[a]",
        "            ^",
    ),
    Case(
        "lora@attn[-]",
        "lora@attn[-1]",
        "expected a layer number after '-', got ']'",
        "  lora@attn[-]",
        "             ^",
    ),
    Case(
        "lora@attn[0:8:0]",
        "lora@attn[0:8:1]",
        "the step of a layer selector may not be 0",
        "  lora@attn[0:8:0]",
        "           ^^^^^^^",
    ),
    Case(
        "lora@attn[1:2:3:4]",
        "lora@attn[1:2:3]",
        "expected ']', got ':'",
        "  lora@attn[1:2:3:4]",
        "                 ^",
    ),
    Case(
        "lora@attn[0,2:4]",
        "lora@attn[0,2]",
        "expected ',' or ']', got ':'",
        "  lora@attn[0,2:4]",
        "               ^",
    ),
    Case(
        "lora@attn[1][2]",
        "lora@attn[1,2]",
        "a site takes only one layer selector",
        "  lora@attn[1][2]",
        "              ^",
    ),
    Case(
        "lora@attn[0:8)",
        "lora@attn[0:8]",
        "expected ':' or ']', got ')'",
        "  lora@attn[0:8)",
        "               ^",
    ),
    Case(
        "lora[0:8]@attn",
        "lora@attn[0:8]",
        "expected '+' or the end of the spec, got '['",
        "  lora[0:8]@attn",
        "      ^",
    ),
    Case(
        "lora@attn]",
        "lora@attn",
        "expected '+' or the end of the spec, got ']'",
        "  lora@attn]",
        "           ^",
    ),
    Case(
        "lora@attn[9223372036854775808:]",
        "lora@attn[922337203685477580:]",
        "the number 9223372036854775808 does not fit in 64 bits",
        "  lora@attn[9223372036854775808:]",
        "            ^^^^^^^^^^^^^^^^^^^",
    ),
)

QUOTES = (
    Case(
        'lora@"attn',
        'lora@"attn"',
        "the string is not closed",
        '  lora@"attn',
        '       ^^^^^ expected " on the same line',
    ),
    Case(
        "lora@'attn\"",
        "lora@'attn'",
        "the string is not closed",
        "  lora@'attn\"",
        "       ^^^^^^ expected ' on the same line",
    ),
    Case(
        'lora@"at\ntn"',
        'lora@"attn"',
        "the string is not closed",
        '  lora@"at',
        '       ^^^ expected " on the same line',
    ),
    Case(
        'lora@"attn\\',
        'lora@"attn\\\\"',
        "the string is not closed",
        '  lora@"attn\\',
        '       ^^^^^^ expected " on the same line',
    ),
    Case(
        'lora(to="C:\\data")@attn',
        'lora(to="C:\\\\data")@attn',
        "unknown escape: there are \\\\ \\\" \\' \\n \\t",
        '  lora(to="C:\\data")@attn',
        "             ^^ write \\\\ for a backslash",
    ),
    Case(
        'lora(to="a\x00b")@attn',
        'lora(to="a\tb")@attn',
        "character U+0000 may not stand in quotes",
        '  lora(to="a\ufffdb")@attn',
        "            ^",
    ),
    Case(
        'lora@"a\u202eb"',
        'lora@"a\xe9b"',
        "character U+202E may not stand in quotes",
        '  lora@"a\ufffdb"',
        "         ^",
    ),
    Case(
        "lora@/attn",
        "lora@/attn/",
        "the regex is not closed",
        "  lora@/attn",
        "       ^^^^^ expected / on the same line",
    ),
    Case(
        "lora@/attn\\/",
        "lora@/attn\\//",
        "the regex is not closed",
        "  lora@/attn\\/",
        "       ^^^^^^^ expected / on the same line",
    ),
    Case(
        "lora@/a(b/",
        "lora@/a(b)/",
        "the regex does not compile: missing ), unterminated subpattern",
        "  lora@/a(b/",
        "         ^",
    ),
    Case(
        "lora@/a\\/b**/",
        "lora@/a\\/b*/",
        "the regex does not compile: multiple repeat",
        "  lora@/a\\/b**/",
        "             ^",
    ),
    Case(
        "lora@/[[a]/",
        "lora@/[a]/",
        "the regex does not compile: Possible nested set at position 1",
        "  lora@/[[a]/",
        "        ^",
    ),
    Case(
        "lora@/(?P<n>a)/",
        "lora@/(?:a)/",
        "only the groups ( (?: (?= (?! (?<= (?<! are known",
        "  lora@/(?P<n>a)/",
        "        ^",
    ),
    Case(
        "lora@/(a+)+$/",
        "lora@/a+$/",
        "a repeat of a group that holds a repeat or an alternative can take for ever",
        "  lora@/(a+)+$/",
        "            ^",
    ),
    Case(
        "lora@/(q|k)*/",
        "lora@/(q|k)?/",
        "a repeat of a group that holds a repeat or an alternative can take for ever",
        "  lora@/(q|k)*/",
        "             ^",
    ),
    Case(
        "lora@/.*.*.*.*.*.*/",
        "lora@/.*.*.*.*.*/",
        "the regex could take too long: use fewer repeats and alternatives",
        "  lora@/.*.*.*.*.*.*/",
        "                   ^",
    ),
    Case(
        "lora@/a{999999999}/",
        "lora@/a{200}/",
        "a repeat in a regex may count to 200 at most",
        "  lora@/a{999999999}/",
        "         ^",
    ),
    Case(
        "lora@/\x07/",
        "lora@/./",
        "character U+0007 may not stand in a regex",
        "  lora@/\ufffd/",
        "        ^",
    ),
)

CHARACTERS = (
    Case(
        "lora\x00@attn",
        "lora@attn",
        "control character U+0000 in the spec",
        "  lora\ufffd@attn",
        "      ^",
    ),
    Case(
        "\x1b[31mlora@attn",
        "lora@attn",
        "control character U+001B in the spec",
        "  \ufffd[31mlora@attn",
        "  ^",
    ),
    Case(
        "lora@attn\x0c",
        "lora@attn\r\n",
        "control character U+000C in the spec",
        "  lora@attn ",
        "           ^",
    ),
    Case(
        "\ufefflora@attn",
        "lora@attn",
        "character U+FEFF may only stand in quotes",
        "  \ufffdlora@attn",
        "  ^",
    ),
    Case(
        "lora@attn\u200b",
        "lora@attn",
        "character U+200B may only stand in quotes",
        "  lora@attn\ufffd",
        "           ^",
    ),
    Case(
        "lora\xa0@attn",
        "lora @attn",
        "character U+00A0 may only stand in quotes",
        "  lora @attn",
        "      ^ did you mean ' '?",
    ),
    Case(
        "lor\xe4@attn",
        "lora@attn",
        "'\xe4' (U+00E4) may only stand in quotes",
        "  lor\xe4@attn",
        "     ^",
    ),
    Case(
        "l\u043era@attn",
        "lora@attn",
        "'\u043e' (U+043E) may only stand in quotes",
        "  l\u043era@attn",
        "   ^",
    ),
    Case(
        "lora(r=8)@attn \U0001f600",
        "lora(r=8)@attn # \U0001f600",
        "'\U0001f600' (U+1F600) may only stand in quotes",
        "  lora(r=8)@attn \U0001f600",
        "                 ^^",
    ),
    Case(
        "lora@\u201cattn\u201d",
        'lora@"attn"',
        "'\u201c' (U+201C) may only stand in quotes",
        "  lora@\u201cattn\u201d",
        "       ^ did you mean '\"'?",
    ),
    Case(
        "lora@linear\u2212head",
        "lora@linear-head",
        "'\u2212' (U+2212) may only stand in quotes",
        "  lora@linear\u2212head",
        "             ^ did you mean '-'?",
    ),
    Case(
        "lora\uff08r=8)@attn",
        "lora(r=8)@attn",
        "'\uff08' (U+FF08) may only stand in quotes",
        "  lora\uff08r=8)@attn",
        "      ^^ did you mean '('?",
    ),
    Case(
        'lora@"\u65e5\u672c\u8a9e" \u8a9e',
        'lora@"\u65e5\u672c\u8a9e"',
        "'\u8a9e' (U+8A9E) may only stand in quotes",
        '  lora@"\u65e5\u672c\u8a9e" \u8a9e',
        "                ^^",
    ),
    Case(
        "lora(r=\u0663)@attn",
        "lora(r=3)@attn",
        "'\u0663' (U+0663) may only stand in quotes",
        "  lora(r=\u0663)@attn",
        "         ^",
    ),
    Case(
        "lora@attn # \x07",
        "lora@attn # \xe9",
        "character U+0007 may not stand in a comment",
        "  lora@attn # \ufffd",
        "              ^",
    ),
    Case(
        "lora@attn!",
        "lora@attn",
        "unexpected character '!'",
        "  lora@attn!",
        "           ^",
    ),
    Case(
        "lora@attn\n+ nf4(base)\n+ lora@?\n+ full",
        "lora@attn\n+ nf4(base)\n+ lora@ffn\n+ full",
        "unexpected character '?'",
        "  + lora@?",
        "         ^ a glob stands in quotes",
    ),
    Case(
        "lora@\ud800",
        "lora@attn",
        "character U+D800 may only stand in quotes",
        "  lora@\ufffd",
        "       ^",
    ),
)

NAMES = (
    Case(
        "lorra(r=8)@attn.q",
        "lora(r=8)@attn.q",
        "unknown method 'lorra'",
        "  lorra(r=8)@attn.q",
        "  ^^^^^ did you mean 'lora'?",
    ),
    Case(
        "LORA@attn",
        "lora@attn",
        "unknown method 'LORA'",
        "  LORA@attn",
        "  ^^^^ did you mean 'lora'?",
    ),
    Case(
        "quux@attn",
        "lora@attn",
        "unknown method 'quux'",
        "  quux@attn",
        "  ^^^^ known: lora, nf4, full, prompt",
    ),
    Case(
        "lora(rank=4)@attn",
        "lora(r=4)@attn",
        "lora has no argument 'rank'",
        "  lora(rank=4)@attn",
        "       ^^^^ did you mean 'r'? it takes: r, alpha, drop, scale, bias, init, act, dims, pair, to",
    ),
    Case(
        "lora(alhpa=4)@attn",
        "lora(alpha=4)@attn",
        "lora has no argument 'alhpa'",
        "  lora(alhpa=4)@attn",
        "       ^^^^^ did you mean 'alpha'? it takes: r, alpha, drop, scale, bias, init, act, dims, pair, to",
    ),
    Case(
        "lora(zzz=4)@attn",
        "lora(alpha=4)@attn",
        "lora has no argument 'zzz'",
        "  lora(zzz=4)@attn",
        "       ^^^ it takes: r, alpha, drop, scale, bias, init, act, dims, pair, to",
    ),
    Case(
        "lora(init=pissa(iter=4))@attn",
        "lora(init=pissa(niter=4))@attn",
        "pissa has no argument 'iter'",
        "  lora(init=pissa(iter=4))@attn",
        "                  ^^^^ did you mean 'niter'? it takes: niter",
    ),
    Case(
        "lora(init=kaiming(a=1))@attn",
        "lora(init=kaiming())@attn",
        "kaiming has no argument 'a'",
        "  lora(init=kaiming(a=1))@attn",
        "                    ^ it takes none",
    ),
    Case(
        "lora(init=pisa)@attn",
        "lora(init=pissa)@attn",
        "lora(init) wants one of kaiming, pissa, got 'pisa'",
        "  lora(init=pisa)@attn",
        "            ^^^^ did you mean 'pissa'?",
    ),
    Case(
        "lora(act=gleu)@attn",
        "lora(act=gelu)@attn",
        "lora(act) wants one of relu, gelu, got 'gleu'",
        "  lora(act=gleu)@attn",
        "           ^^^^ did you mean 'gelu'?",
    ),
    Case(
        "lora(act=gelu())@attn",
        "lora(act='gelu')@attn",
        "lora(act=gelu) takes no arguments",
        "  lora(act=gelu())@attn",
        "           ^^^^^^ write gelu",
    ),
)

ARGUMENTS = (
    Case(
        "lora(8)@attn",
        "lora(r=8)@attn",
        "lora takes keyword arguments: write lora(r=8)",
        "  lora(8)@attn",
        "       ^",
    ),
    Case(
        "lora(8, r=4)@attn",
        "lora(alpha=8, r=4)@attn",
        "lora takes keyword arguments: write lora(alpha=8)",
        "  lora(8, r=4)@attn",
        "       ^",
    ),
    Case(
        "lora(0.5)@attn",
        "lora(alpha=0.5)@attn",
        "lora takes keyword arguments: write lora(alpha=0.5)",
        "  lora(0.5)@attn",
        "       ^^^",
    ),
    Case(
        "lora(true)@attn",
        "lora(bias=true)@attn",
        "lora takes keyword arguments: write lora(bias=true)",
        "  lora(true)@attn",
        "       ^^^^",
    ),
    Case(
        "lora(none)@attn",
        "lora(alpha=none)@attn",
        "lora takes keyword arguments: write lora(alpha=none)",
        "  lora(none)@attn",
        "       ^^^^",
    ),
    Case(
        "lora(init=pissa(4))@attn",
        "lora(init=pissa(niter=4))@attn",
        "pissa takes keyword arguments: write pissa(niter=4)",
        "  lora(init=pissa(4))@attn",
        "                  ^",
    ),
    Case(
        "lora(pissa(niter=4))@attn",
        "lora(init=pissa(niter=4))@attn",
        "lora takes keyword arguments: write lora(init=pissa(niter=4))",
        "  lora(pissa(niter=4))@attn",
        "       ^^^^^^^^^^^^^^",
    ),
    Case(
        "nf4(base, -8)",
        "nf4(base, block=32)",
        "nf4 takes keyword arguments",
        "  nf4(base, -8)",
        "            ^^ it takes: block, double_quant",
    ),
    Case(
        "lora((a, b))@attn",
        "lora(dims=(1, 2))@attn",
        "lora takes keyword arguments",
        "  lora((a, b))@attn",
        "       ^^^^^^ it takes: r, alpha, drop, scale, bias, init, act, dims, pair, to",
    ),
    Case(
        "lora(r=eight)@attn",
        "lora(r=8)@attn",
        "lora(r) wants an int, got 'eight'",
        "  lora(r=eight)@attn",
        "         ^^^^^",
    ),
    Case(
        'lora(r="8")@attn',
        "lora(r=8)@attn",
        'lora(r) wants an int, got "8"',
        '  lora(r="8")@attn',
        "         ^^^",
    ),
    Case(
        "lora(r=8.0)@attn",
        "lora(r=8)@attn",
        "lora(r) wants an int, got '8.0'",
        "  lora(r=8.0)@attn",
        "         ^^^",
    ),
    Case(
        "lora(r=true)@attn",
        "lora(bias=true)@attn",
        "lora(r) wants an int, got 'true'",
        "  lora(r=true)@attn",
        "         ^^^^",
    ),
    Case(
        "lora(r=none)@attn",
        "lora(alpha=none)@attn",
        "lora(r) wants an int, got 'none'",
        "  lora(r=none)@attn",
        "         ^^^^",
    ),
    Case(
        "lora(r=(8,))@attn",
        "lora(dims=(8,))@attn",
        "lora(r) wants an int, got '(8,)'",
        "  lora(r=(8,))@attn",
        "         ^^^^",
    ),
    Case(
        "lora(r=pissa(niter=4))@attn",
        "lora(init=pissa(niter=4))@attn",
        "lora(r) wants an int, got 'pissa(niter=4)'",
        "  lora(r=pissa(niter=4))@attn",
        "         ^^^^^^^^^^^^^^",
    ),
    Case(
        "lora(alpha=true)@attn",
        "lora(alpha=1)@attn",
        "lora(alpha) wants a float or none, got 'true'",
        "  lora(alpha=true)@attn",
        "             ^^^^",
    ),
    Case(
        "lora(bias=1)@attn",
        "lora(bias=true)@attn",
        "lora(bias) wants true or false, got '1'",
        "  lora(bias=1)@attn",
        "            ^",
    ),
    Case(
        "lora(to=8)@attn",
        "lora(to='8')@attn",
        "lora(to) wants a string, got '8'",
        "  lora(to=8)@attn",
        "          ^",
    ),
    Case(
        "lora(init=4)@attn",
        "lora(init=pissa)@attn",
        "lora(init) wants one of kaiming, pissa, got '4'",
        "  lora(init=4)@attn",
        "            ^",
    ),
    Case(
        "lora(scale=rss)@attn",
        "lora(scale=rs)@attn",
        "lora(scale) wants one of r, rs, got 'rss'",
        "  lora(scale=rss)@attn",
        "             ^^^ did you mean 'rs'?",
    ),
    Case(
        "lora(scale=rs(1))@attn",
        "lora(scale=rs)@attn",
        "lora(scale=rs) takes no arguments",
        "  lora(scale=rs(1))@attn",
        "             ^^^^^ write rs",
    ),
    Case(
        "lora(scale=8)@attn",
        "lora(scale=r)@attn",
        "lora(scale) wants one of r, rs, got '8'",
        "  lora(scale=8)@attn",
        "             ^",
    ),
    Case(
        "lora(dims=4)@attn",
        "lora(dims=(4,))@attn",
        "lora(dims) wants a tuple, each item an int, got '4'",
        "  lora(dims=4)@attn",
        "            ^",
    ),
    Case(
        "lora(dims=(1, a))@attn",
        "lora(dims=(1, 2))@attn",
        "lora(dims) wants a tuple, each item an int, got '(1, a)'",
        "  lora(dims=(1, a))@attn",
        "            ^^^^^^",
    ),
    Case(
        "lora(pair=(1, 2, 3))@attn",
        "lora(pair=(1, 2))@attn",
        "lora(pair) wants a tuple (an int, a float), got '(1, 2, 3)'",
        "  lora(pair=(1, 2, 3))@attn",
        "            ^^^^^^^^^",
    ),
    Case(
        "lora(r=0)@attn",
        "lora(r=1)@attn",
        "lora(r) must be at least 1, got 0",
        "  lora(r=0)@attn",
        "         ^",
    ),
    Case(
        "lora(r=-8)@attn",
        "lora(r=8)@attn",
        "lora(r) must be at least 1, got -8",
        "  lora(r=-8)@attn",
        "         ^^",
    ),
    Case(
        "lora(alpha=0)@attn",
        "lora(alpha=0.1)@attn",
        "lora(alpha) must be above 0, got 0",
        "  lora(alpha=0)@attn",
        "             ^",
    ),
    Case(
        "lora(drop=1.0)@attn",
        "lora(drop=0.99)@attn",
        "lora(drop) must be below 1, got 1.0",
        "  lora(drop=1.0)@attn",
        "            ^^^",
    ),
    Case(
        "lora(dims=(4, 0))@attn",
        "lora(dims=(4, 1))@attn",
        "lora(dims) must be at least 1, got 0",
        "  lora(dims=(4, 0))@attn",
        "            ^^^^^^",
    ),
    Case(
        "lora(init=pissa(niter=65))@attn",
        "lora(init=pissa(niter=64))@attn",
        "pissa(niter) must be at most 64, got 65",
        "  lora(init=pissa(niter=65))@attn",
        "                        ^^",
    ),
    Case(
        "lora(bias=true, drop=0.5)@attn",
        "lora(bias=true)@attn",
        "lora: bias and drop exclude each other",
        "  lora(bias=true, drop=0.5)@attn",
        "  ^^^^^^^^^^^^^^^^^^^^^^^^^",
    ),
    Case(
        "lora(init=pissa(niter=13))@attn",
        "lora(init=pissa(niter=12))@attn",
        "pissa: niter may not be 13",
        "  lora(init=pissa(niter=13))@attn",
        "            ^^^^^^^^^^^^^^^",
    ),
    Case(
        "prompt@embed",
        "prompt(n=4)@embed",
        "prompt needs the argument 'n'",
        "  prompt@embed",
        "  ^^^^^^ it wants an int",
    ),
)

PLACES = (
    Case(
        "lora",
        "lora@attn.q,v",
        "lora does not say where it goes",
        "  lora",
        "  ^^^^ write lora@attn.q,v",
    ),
    Case(
        "en: ~lora(r=8)",
        "en: ~lora(r=8)@attn.q,v",
        "lora does not say where it goes",
        "  en: ~lora(r=8)",
        "       ^^^^ write lora(r=8)@attn.q,v",
    ),
    Case(
        "nf4",
        "nf4(base)",
        "nf4 does not say where it goes",
        "  nf4",
        "  ^^^ write nf4(base)",
    ),
    Case(
        "nf4(double_quant=true)",
        "nf4(base, double_quant=true)",
        "nf4 does not say where it goes",
        "  nf4(double_quant=true)",
        "  ^^^ write nf4(base, double_quant=true)",
    ),
    Case(
        "full + lora",
        "full + lora@attn",
        "lora does not say where it goes",
        "  full + lora",
        "         ^^^^ write lora@attn.q,v",
    ),
)

ALIASES = (
    Case(
        "let",
        "let a = attn; lora@a",
        "expected a name after 'let', got the end of the spec",
        "  let",
        "     ^ write for example let mixer = 'blocks.*.mixer'; lora@mixer",
    ),
    Case(
        "let = attn; lora@a",
        "let a = attn; lora@a",
        "expected a name after 'let', got '='",
        "  let = attn; lora@a",
        "      ^ write for example let mixer = 'blocks.*.mixer'; lora@mixer",
    ),
    Case(
        "let 'a' = attn; lora@a",
        "let a = attn; lora@a",
        "expected a name after 'let', got 'a'",
        "  let 'a' = attn; lora@a",
        "      ^^^ write for example let mixer = 'blocks.*.mixer'; lora@mixer",
    ),
    Case(
        "let@attn",
        "lora@attn",
        "expected a name after 'let', got '@'",
        "  let@attn",
        "     ^ write for example let mixer = 'blocks.*.mixer'; lora@mixer",
    ),
    Case(
        "let a: attn; lora@a",
        "let a = attn; lora@a",
        "expected '=' after 'let a', got ':'",
        "  let a: attn; lora@a",
        "       ^",
    ),
    Case(
        "let a = ; lora@a",
        "let a = attn; lora@a",
        "expected a site after '=', got ';'",
        "  let a = ; lora@a",
        "          ^",
    ),
    Case(
        "let a = attn,; lora@a",
        "let a = attn; lora@a",
        "expected a site after ',', got ';'",
        "  let a = attn,; lora@a",
        "               ^",
    ),
    Case(
        "let a = -head; lora@a",
        "let a = linear-head; lora@a",
        "expected a site after '=', got '-'",
        "  let a = -head; lora@a",
        "          ^ '-' stands right behind what it removes from: linear-head",
    ),
    Case(
        "let a = attn",
        "let a = attn; lora@a",
        "expected ',', '-' or ';', got the end of the spec",
        "  let a = attn",
        "              ^ a 'let' ends in ';'",
    ),
    Case(
        "let a = attn;",
        "let a = attn; lora@a",
        "expected a method after ';', got the end of the spec",
        "  let a = attn;",
        "               ^",
    ),
    Case(
        "let a = attn;;lora@a",
        "let a = attn;lora@a",
        "expected a method after ';', got ';'",
        "  let a = attn;;lora@a",
        "               ^",
    ),
    Case(
        "let a = attn\nlora@a",
        "let a = attn;\nlora@a",
        "expected ',', '-' or ';', got 'lora'",
        "  lora@a",
        "  ^^^^ a 'let' ends in ';'",
    ),
    Case(
        "let a = lora(r=8); lora@a",
        "let a = attn; lora(r=8)@a",
        "expected ',', '-' or ';', got '('",
        "  let a = lora(r=8); lora@a",
        "              ^ an alias names sites, not methods",
    ),
    Case(
        "let a = lora@attn; lora@a",
        "let a = attn; lora@a",
        "expected ',', '-' or ';', got '@'",
        "  let a = lora@attn; lora@a",
        "              ^ an alias names sites, not methods",
    ),
    Case(
        "let a = attn + lora@a",
        "let a = attn; lora@a",
        "expected ',', '-' or ';', got '+'",
        "  let a = attn + lora@a",
        "               ^ a 'let' ends in ';'",
    ),
    Case(
        "let a = true; lora@a",
        "let a = 'true'; lora@a",
        "'true' is a value, not a site",
        "  let a = true; lora@a",
        "          ^^^^",
    ),
    Case(
        "lora@attn; nf4(base)",
        "lora@attn + nf4(base)",
        "expected '+' or the end of the spec, got ';'",
        "  lora@attn; nf4(base)",
        "           ^ only a 'let' ends in ';': methods are joined by '+'",
    ),
    Case(
        "lora@attn + let a = ffn; nf4(a)",
        "let a = ffn; lora@attn + nf4(a)",
        "a 'let' stands before the first method",
        "  lora@attn + let a = ffn; nf4(a)",
        "              ^^^",
    ),
    Case(
        "a: let@attn",
        "a: lora@attn",
        "a 'let' stands before the first method",
        "  a: let@attn",
        "     ^^^",
    ),
    Case(
        "~let@attn",
        "~lora@attn",
        "a 'let' stands before the first method",
        "  ~let@attn",
        "   ^^^",
    ),
    Case(
        "let attn = 'x'; lora@attn",
        "let attns = 'x'; lora@attns",
        "'attn' is a role and cannot be an alias",
        "  let attn = 'x'; lora@attn",
        "      ^^^^",
    ),
    Case(
        "let vision = 'x'; lora@vision",
        "let visual = 'x'; lora@visual",
        "'vision' is a role and cannot be an alias",
        "  let vision = 'x'; lora@vision",
        "      ^^^^^^",
    ),
    Case(
        "let q = 'x'; lora@q",
        "let mixer = 'x'; lora@mixer",
        "'q' is the short form of the role attn.q and cannot be an alias",
        "  let q = 'x'; lora@q",
        "      ^",
    ),
    Case(
        "let experts = 'x'; lora@experts",
        "let expert = 'x'; lora@expert",
        "'experts' is the short form of the role ffn.experts and cannot be an alias",
        "  let experts = 'x'; lora@experts",
        "      ^^^^^^^",
    ),
    Case(
        "let let = 'x'; lora@let",
        "let lets = 'x'; lora@lets",
        "'let' is a reserved word and cannot be an alias",
        "  let let = 'x'; lora@let",
        "      ^^^",
    ),
    Case(
        "let none = 'x'; lora@none",
        "let None_ = 'x'; lora@None_",
        "'none' is a reserved word and cannot be an alias",
        "  let none = 'x'; lora@none",
        "      ^^^^",
    ),
    Case(
        "let a.b = 'x'; lora@a.b",
        "let a_b = 'x'; lora@a_b",
        "the alias 'a.b' may not hold a dot",
        "  let a.b = 'x'; lora@a.b",
        "      ^^^",
    ),
    Case(
        "let a = 'x'; let a = 'y'; lora@a",
        "let a = 'x'; let b = 'y'; lora@a,b",
        "the alias 'a' is defined twice",
        "  let a = 'x'; let a = 'y'; lora@a",
        "                   ^",
    ),
    Case(
        "let a = norm,a; lora@a",
        "let a = norm,attn; lora@a",
        "the alias 'a' is defined by itself",
        "  let a = norm,a; lora@a",
        "               ^",
    ),
    Case(
        "let a = norm-b; let b = 'x'; lora@a",
        "let b = 'x'; let a = norm-b; lora@a",
        "the alias 'b' is used before it is defined",
        "  let a = norm-b; let b = 'x'; lora@a",
        "               ^",
    ),
    Case(
        "let a = mixer; let mixer = 'x'; lora@a",
        "let mixer = 'x'; let a = mixer; lora@a",
        "the alias 'mixer' is used before it is defined",
        "  let a = mixer; let mixer = 'x'; lora@a",
        "          ^^^^^",
    ),
    Case(
        "let a = attn[0:2]; lora@norm,a[1]",
        "let a = attn; lora@norm,a[1]",
        "the alias 'a' has layers of its own",
        "  let a = attn[0:2]; lora@norm,a[1]",
        "                                ^^^ write a",
    ),
    Case(
        "let a = attn[0]; let b = a-norm; lora@attn-b[:]",
        "let a = attn[0]; let b = a-norm; lora@attn-b",
        "the alias 'b' has layers of its own",
        "  let a = attn[0]; let b = a-norm; lora@attn-b[:]",
        "                                              ^^^ write b",
    ),
    Case(
        "let a = linear-attn[0]; lora@a[1]",
        "let a = linear-attn; lora@a[1]",
        "the alias 'a' has layers of its own",
        "  let a = linear-attn[0]; lora@a[1]",
        "                                ^^^ write a",
    ),
    Case(
        "let a = attn; lora@a[0][1]",
        "let a = attn; lora@a[0]",
        "a site takes only one layer selector",
        "  let a = attn; lora@a[0][1]",
        "                         ^",
    ),
    Case(
        "let a = attn; lora@norm",
        "let a = attn; lora@a",
        "the alias 'a' is never used",
        "  let a = attn; lora@norm",
        "      ^",
    ),
    Case(
        "let a = attn; lora(act=a)@norm",
        "let a = attn; lora@norm,a",
        "the alias 'a' is never used",
        "  let a = attn; lora(act=a)@norm",
        "      ^",
    ),
    Case(
        "let towers = 'x'; lora@towres + nf4(base)",
        "let towers = 'x'; lora@towers + nf4(base)",
        "the alias 'towers' is never used",
        "  let towers = 'x'; lora@towres + nf4(base)",
        "      ^^^^^^ 'towres' is no site: did you mean 'towers'?",
    ),
    Case(
        "let towers = 'x'; let all = towers; lora@attn.q,tower",
        "let towers = 'x'; let all = towers; lora@attn.q,all",
        "the alias 'all' is never used",
        "  let towers = 'x'; let all = towers; lora@attn.q,tower",
        "                        ^^^",
    ),
    Case(
        "let a = attn; lorra@a",
        "let a = attn; lora@a",
        "unknown method 'lorra'",
        "  let a = attn; lorra@a",
        "                ^^^^^ did you mean 'lora'?",
    ),
)

CASES = (
    *(*CLAUSES, *PARENTHESES, *NUMBERS, *SITES, *LAYERS),
    *(*QUOTES, *CHARACTERS, *NAMES, *ARGUMENTS, *PLACES, *ALIASES),
)


def message_of(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        bind(parse(text), METHODS)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.bad[:60]))
def test_the_message_is_exact(case: Case) -> None:
    assert message_of(case.bad) == f"{case.message}\n{case.line}\n{case.marks}"


@pytest.mark.parametrize("good", sorted({case.good for case in CASES}), ids=ascii)
def test_the_neighbour_is_right(good: str) -> None:
    assert bind(parse(good), METHODS)


def test_no_two_wrong_specs_are_the_same() -> None:
    assert len({case.bad for case in CASES}) == len(CASES)


def layered(count: int, sites: str) -> str:
    """Aliases `a1`, `a2`, ..., `a`, of which each is `sites` with the one before it for `{0}`."""
    names = ["attn", *(f"a{i}" for i in range(1, count)), "a"]
    return "".join(f"let {new} = {sites.format(old)};" for old, new in itertools.pairwise(names))


LONG = (
    ("x" * 100_000, "the spec is 100,000 characters long; the limit is 20,000"),
    ("lora@attn + " * 8_333 + "nf4", "the spec is 99,999 characters long; the limit is 20,000"),
    (" " * 20_001, "the spec is 20,001 characters long; the limit is 20,000"),
    ("+".join("a" * 9_000), "the spec is 35,997 characters long in canonical spelling; the limit is 20,000"),
    ("(" * 5_000, "expected a method, got '('"),
    ("[" * 5_000, "expected a method, got '['"),
    ("lora(" + "(" * 5_000, "parentheses are nested more than 50 deep"),
    ("lora(" * 1_000, "parentheses are nested more than 50 deep"),
    ("lora(init=" + "pissa(niter=" * 1_000, "parentheses are nested more than 50 deep"),
    ("lora(dims=" + "(" * 50 + ")" * 50 + ")@attn", "parentheses are nested more than 50 deep"),
    ("lora@attn" + "[" * 5_000, "expected a layer number or ':', got '['"),
    ("~" * 5_000, "expected a method after '~', got '~'"),
    ("lora@attn" + "-" * 5_000, "expected a site after '-', got '-'"),
    ("lora@/" + "a" * 501 + "/", "the regex is 501 characters long; the limit is 500"),
    ("lora@/" + "(" * 21 + ")" * 21 + "/", "the regex nests groups more than 20 deep"),
    ("lora@/" + ".?" * 100 + "/", "the regex could take too long: use fewer repeats and alternatives"),
    ("lora@/" + "(.|.)" * 99 + "/", "the regex could take too long: use fewer repeats and alternatives"),
    ("lora(r=" + "9" * 19_000, f"the number {'9' * 37}... does not fit in 64 bits"),
    ("lora(alpha=1e" + "9" * 19_000, f"the number 1e{'9' * 35}... is too large for a float"),
    ("z" * 19_000 + "@attn", f"unknown method '{'z' * 37}...'"),
    ("let " + "z" * 19_000 + " = attn; lora@attn", f"the alias '{'z' * 37}...' is never used"),
    ("let a = " * 2_000, "expected ',', '-' or ';', got 'a'"),
    ("let a = attn;" * 1_500, "the alias 'a' is defined twice"),
    (
        layered(15, ",".join(["{0}"] * 100)) + "lora@a",
        "the aliases stand for more than 10,000 sites",
    ),
    (layered(600, "norm,{0}-head") + "lora@a", "aliases are nested more than 50 deep"),
    (layered(600, "{0}") + "lora@a", "aliases are nested more than 50 deep"),
)


@pytest.mark.parametrize(("text", "first_line"), LONG, ids=lambda value: ascii(value[:30]))
def test_hostile_lengths_are_errors_of_three_short_lines(text: str, first_line: str) -> None:
    lines = message_of(text).split("\n")
    assert lines[0] == first_line
    assert len(lines) == 3
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize(
    "text",
    [
        "lora@" + ",".join(["attn"] * 3_900),
        "lora@" + "-".join(["attn"] * 3_900),
        " + ".join(["nf4(base)"] * 1_600),
        "lora(to='" + "x" * 19_900 + "')@attn",
        "lora(dims=(" + "1, " * 6_000 + "))@attn",
        "lora@attn" + "#\n" * 9_000,
        "lora@/" + "a" * 500 + "/",
        "lora@/" + "(" * 20 + ")" * 20 + "/",
        layered(50, "norm,{0}-head") + "lora@a-a",
        "let a = " + ",".join(["attn"] * 3_800) + "; lora@a-a",
    ],
    ids=lambda text: text[:30],
)
def test_long_but_right(text: str) -> None:
    spec = parse(text)
    assert bind(spec, METHODS)
    assert parse(str(spec)) == spec


def test_fifty_parentheses_are_not_too_many() -> None:
    text = "lora(dims=" + "(" * 49 + ")" * 49 + ")@attn"
    assert message_of(text).startswith("lora(dims) wants a tuple, each item an int, got '(")


def test_default_sites_point_at_the_method() -> None:
    bound = bind(parse("lora@attn + full"), METHODS)[1]
    assert [(term.text, term.span) for term in bound.sites.terms] == [("norm", (12, 16)), ("head", (12, 16))]


def test_the_error_survives_pickling() -> None:
    with pytest.raises(SpecError) as caught:
        parse("lora@")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.start, again.stop, again.source) == (5, 5, "lora@")


def test_the_caret_counts_terminal_columns() -> None:
    assert caret("\u65e5\u672c = e\u0301x", 7, 8) == "  \u65e5\u672c = e\u0301x\n  " + " " * 8 + "^"
    assert caret("\u65e5\u672c", 0, 2) == "  \u65e5\u672c\n  ^^^^"


def test_a_long_line_is_cut_around_the_caret() -> None:
    shown, marks = caret("a" * 200 + "!" + "b" * 200, 200, 201).split("\n")
    assert len(shown) < 110
    assert shown[marks.index("^")] == "!"


def test_nearest_ignores_case() -> None:
    assert nearest("LORRA", ["nf4", "lora"]) == ["lora"]
    assert nearest("quux", ["nf4", "lora"]) == []


def test_an_empty_table_of_methods() -> None:
    with pytest.raises(SpecError, match="known: none"):
        bind(parse("lora@attn"), {})
