"""The errors that rewrite raises; the one module that every floor may import.

Three kinds, one base: what the user wrote (`SpecError`), what it finds in the model (`ResolveError`), and
what the compiler or a file could not do (`RewriteError`).  This module does not format model tables.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_WINDOW = 96  # a longer source line is cut to this many characters around the caret


class Error(Exception):
    """Base class of every error that rewrite raises on purpose."""


class RewriteError(Error):
    """A model, a graph or a file cannot be treated as asked; says what to do instead."""


class SourceError(Error):
    """An error that points at characters of the user's spec.

    >>> print(SourceError("unknown method 'lorra'", "lorra(r=8)@attn.q", 0, 5, "did you mean 'lora'?"))
    unknown method 'lorra'
      lorra(r=8)@attn.q
      ^^^^^ did you mean 'lora'?
    """

    def __init__(self, message: str, source: str, start: int, stop: int, hint: str = "") -> None:
        self.message, self.source, self.start, self.stop, self.hint = message, source, start, stop, hint
        super().__init__(f"{message}\n{caret(source, start, stop, hint)}")

    def __reduce__(self):
        return type(self), (self.message, self.source, self.start, self.stop, self.hint)


class SpecError(SourceError):
    """The spec is malformed, or names a method or an argument that does not exist."""


class ResolveError(SourceError):
    """The spec is well formed but does not fit this model."""


def caret(source: str, start: int, stop: int, hint: str = "") -> str:
    """The line of `source` that holds `start`, with carets under `start:stop` and the hint behind them."""
    begin = source.rfind("\n", 0, start) + 1
    end = source.find("\n", start)
    line = source[begin : len(source) if end < 0 else end]
    at, width = start - begin, max(1, min(stop, begin + len(line)) - start)
    cut = max(0, at - _WINDOW // 2)
    shown = line[cut : cut + _WINDOW]
    prefix, suffix = "..." if cut else "", "..." if cut + _WINDOW < len(line) else ""
    shown = "".join(" " if c.isspace() else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
    before, marked = shown[: at - cut], shown[at - cut : at - cut + width]
    marks = " " * (len(prefix) + _columns(before)) + "^" * max(1, _columns(marked))
    return f"  {prefix}{shown}{suffix}\n  {marks}{' ' + hint if hint else ''}"


def _columns(text: str) -> int:
    """How many terminal columns `text` takes: East Asian and emoji characters two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `word` in any case, best first; empty when nothing is near.

    >>> nearest("LoRRA", ["lora", "nf4"])
    ['lora']
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:80].lower(), list(names), n=count, cutoff=0.5)
    return [names[name] for name in close]
