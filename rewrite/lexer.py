"""Characters of a spec -> tokens, one at a time, so that the first mistake from the left is the one reported.

Numbers, strings and regexes are checked here, regexes also for running time: what this module lets through
can be matched against module paths without a blow-up.  It does not know the grammar (`rewrite.parser`).
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from rewrite.errors import SpecError
from rewrite.spec import ESCAPES, Span

MAX_REGEX = 500
MAX_GROUPS = 20
MAX_WAYS = 5e7  # ways to match one module path, some 0.2 s of backtracking; five free repeats are 2.4e7
MAX_COUNT = 200  # `re` runs (?:){1000000000} to the end, whatever the text
MAX_INT = 2**63 - 1

MARKS = frozenset("()[],=@+-~:;")
_GLOB = "a glob stands in quotes"
_PATH = 80  # characters of a long module path
_BLANK = re.compile(r"[ \t\r\n]+")
_COMMENT = re.compile(r"#[^\r\n]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NUMBER_TAIL = re.compile(r"[A-Za-z0-9_.]*")
_REPEAT = re.compile(r"(?:[*+?]|\{[0-9]*,?[0-9]*\})[?+]?")
_ESCAPED = re.compile(r"\\.")
_GROUP = re.compile(r"\((?:\?(?::|=|!|<=|<!))?(?!\?)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_LOOKALIKES = {
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2013": "-",
    "\u2014": "-",
    "\u2212": "-",
}


@dataclass(frozen=True)
class Token:
    """`kind`: word, number, string, regex, end or the mark itself; `text`: as written; `value`: meant."""

    kind: str
    text: str
    span: Span
    value: int | float | str = ""

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end of the spec"
        return brief(self.text) if self.kind == "string" else f"'{brief(self.text)}'"


def brief(text: str, limit: int = 40) -> str:
    """`text`, cut to `limit` characters for use in a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Lexer:
    """Reads `source` token by token; `next()` gives the end token for ever once the text is used up."""

    def __init__(self, source: str) -> None:
        self.source, self.at, self.last = source, 0, 0

    def error(self, start: int, stop: int, message: str, hint: str = "") -> SpecError:
        """The error to raise for characters `start:stop`."""
        return SpecError(message, self.source, start, stop, hint)

    def next(self) -> Token:
        """The next token, past blanks and comments."""
        self._skip()
        if self.at == len(self.source):
            # The end is reported where the text stops, not behind blank lines and comments.
            return Token("end", "", Span(self.last, self.last))
        token = self._read(self.source[self.at])
        self.at = self.last = token.span.stop
        return token

    def _skip(self) -> None:
        while self.at < len(self.source):
            if blank := _BLANK.match(self.source, self.at):
                self.at = blank.end()
            elif comment := _COMMENT.match(self.source, self.at):
                self._printable(self.at, comment.end(), "a comment")
                self.at = comment.end()
            else:
                return

    def _read(self, first: str) -> Token:
        if first in MARKS:
            return Token(first, first, Span(self.at, self.at + 1))
        if first in "\"'":
            return self._string(first)
        if first == "/":
            return self._regex()
        if word := _WORD.match(self.source, self.at):
            if self.source.startswith(".", word.end()):
                hint = _GLOB if self.source[word.end() + 1 : word.end() + 2] in ("*", "?") else ""
                raise self.error(self.at, word.end() + 1, "a name may not end in '.'", hint)
            return Token("word", word[0], Span(*word.span()), word[0])
        if number := _NUMBER.match(self.source, self.at):
            return self._number(number)
        raise self._stranger(first)

    def _stranger(self, char: str) -> SpecError:
        code, plain = f"U+{ord(char):04X}", _LOOKALIKES.get(char) or unicodedata.normalize("NFKC", char)
        if unicodedata.category(char) == "Cc":
            message = f"control character {code} in the spec"
        elif char.isascii():
            message = f"unexpected character '{char}'"
        else:
            shown = f"'{char}' ({code})" if char.isprintable() else f"character {code}"
            message = f"{shown} may only stand in quotes"
        swap = not char.isascii() and plain.isascii() and plain.isprintable()
        hint = f"did you mean '{plain}'?" if swap else _GLOB if char in "*?" else ""
        return self.error(self.at, self.at + 1, message, hint)

    def _number(self, match: re.Match[str]) -> Token:
        text, span = match[0], Span(*match.span())
        tail = _NUMBER_TAIL.match(self.source, match.end())
        if tail and tail[0]:
            raise self.error(span.start, tail.end(), f"malformed number '{brief(text + tail[0])}'")
        if text.isdecimal():
            # int() itself refuses very long digit strings with a ValueError of its own.
            if len(text.lstrip("0")) > 19 or int(text) > MAX_INT:
                raise self.error(*span, f"the number {brief(text)} does not fit in 64 bits")
            return Token("number", text, span, int(text))
        value = float(text)
        if math.isinf(value):
            raise self.error(*span, f"the number {brief(text)} is too large for a float")
        if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise self.error(*span, f"the number {brief(text)} is too small for a float")
        return Token("number", text, span, value)

    def _string(self, quote: str) -> Token:
        start = at = self.at
        value: list[str] = []
        at += 1
        while self.source[at : at + 1] not in (quote, "", "\n", "\r"):
            char = self.source[at]
            if char == "\\" and self.source[at + 1 : at + 2] not in ("", "\n", "\r"):
                at += 1
                if self.source[at] not in ESCAPES:
                    hint = "write \\\\ for a backslash"
                    raise self.error(at - 1, at + 1, "unknown escape: there are \\\\ \\\" \\' \\n \\t", hint)
                char = ESCAPES[self.source[at]]
            value.append(char)
            at += 1
        self._printable(start, at, "quotes")
        if self.source[at : at + 1] != quote:
            raise self.error(start, at, "the string is not closed", f"expected {quote} on the same line")
        return Token("string", self.source[start : at + 1], Span(start, at + 1), "".join(value))

    def _regex(self) -> Token:
        start = at = self.at
        pattern, offsets = "", list[int]()
        at += 1
        while self.source[at : at + 1] not in ("/", "", "\n", "\r"):
            width = 2 if self.source[at] == "\\" and self.source[at + 1 : at + 2] not in ("", "\n", "\r") else 1
            chars = self.source[at : at + width]
            chars = "/" if chars == "\\/" else chars
            pattern += chars
            offsets += [at] * len(chars)
            at += width
        self._printable(start, at, "a regex")
        if self.source[at : at + 1] != "/":
            raise self.error(start, at, "the regex is not closed", "expected / on the same line")
        stop = at + 1
        if not pattern:
            raise self.error(start, stop, "the regex is empty")
        if len(pattern) > MAX_REGEX:
            raise self.error(start, stop, f"the regex is {len(pattern):,} characters long; the limit is {MAX_REGEX}")
        if found := regex_fault(pattern):
            where, message = found
            where = offsets[where] if where < len(offsets) else at
            raise self.error(where, where + 1, message)
        return Token("regex", self.source[start:stop], Span(start, stop), pattern)

    def _printable(self, start: int, stop: int, place: str) -> None:
        for at in range(start, stop):
            char = self.source[at]
            if not char.isprintable() and char != "\t":
                raise self.error(at, at + 1, f"character U+{ord(char):04X} may not stand in {place}")


def regex_fault(pattern: str) -> tuple[int, str] | None:
    """What is wrong with a regex and where: it does not compile, or could take very long on a module path.

    >>> regex_fault("(q|v)_proj"), regex_fault("(a+)+b")
    (None, (4, 'a repeat of a group that holds a repeat or an alternative can take for ever'))
    """
    if found := _slow(pattern):
        return found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except re.error as error:
        return error.pos or 0, f"the regex does not compile: {error.msg}"
    except (OverflowError, RecursionError, Warning) as error:
        return 0, f"the regex does not compile: {error}"
    return None


def _slow(pattern: str) -> tuple[int, str] | None:
    """The first place where backtracking could multiply; an unbalanced pattern is left to `re.compile`."""
    repeats, ways = 0, 1
    groups = [_Group()]
    closed = None  # the group that ends right before this part
    for at, kind, text in _parts(pattern):
        if kind == "(":
            if not text:
                return at, "only the groups ( (?: (?= (?! (?<= (?<! are known"
            if len(groups) > MAX_GROUPS:
                return at, f"the regex nests groups more than {MAX_GROUPS} deep"
            groups.append(_Group())
        elif kind == "|":
            groups[-1].choices += 1
            groups[-1].varies = True
        elif kind == "repeat":
            if max(map(int, re.findall("[0-9]{1,9}", text)), default=0) > MAX_COUNT:
                return at, f"a repeat in a regex may count to {MAX_COUNT} at most"
            if closed and closed.varies and text[0] != "?":
                return at, "a repeat of a group that holds a repeat or an alternative can take for ever"
            repeats, ways = repeats + (text[0] != "?"), ways * (1 + (text[0] == "?"))
            groups[-1].varies = True
        closed = groups.pop() if kind == ")" and len(groups) > 1 else None
        if closed:
            groups[-1].varies |= closed.varies
            ways *= closed.choices
        if ways * math.comb(_PATH, min(repeats, _PATH // 2)) > MAX_WAYS:
            return at, "the regex could take too long: use fewer repeats and alternatives"
    return None


@dataclass
class _Group:
    """An open group of a regex: how many alternatives, and whether it can match in more than one way."""

    choices: int = 1
    varies: bool = False


def _parts(pattern: str) -> Iterator[tuple[int, str, str]]:
    """The position, kind and text of what groups, chooses or repeats in a regex; all else is `other`."""
    at = 0
    while at < len(pattern):
        kind, char = "other", pattern[at]
        found = _ESCAPED.match(pattern, at) or _CLASS.match(pattern, at)
        if char in "()|":
            kind, found = char, _GROUP.match(pattern, at) if char == "(" else None
        elif not found and (found := _REPEAT.match(pattern, at)):
            kind = "repeat"
        text = found[0] if found else "" if kind == "(" else char
        yield at, kind, text
        at += len(text) or 1
