"""Reading the program listings of graphs for showing them: nodes, what they read, and coloured, shortened text.

A listing is what `rewrite.passes.dump.program` prints.  Nothing here touches a graph.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rewrite.runtime.adapter import ADAPTERS


@dataclass(frozen=True)
class Node:
    """One line of a listing: `text` is `name = op(arguments)`, `type` is `f32[2, 9]` or empty."""

    name: str
    text: str
    type: str
    site: str
    rule: str


def read(program: str) -> tuple[dict[str, str], list[Node]]:
    """The inputs (name -> type) and the nodes of a listing, in order; the returned value is no node."""
    inputs: dict[str, str] = {}
    nodes: list[Node] = []
    header, site = True, ""
    for line in program.splitlines():
        text, _, comment = line.partition("  #")
        if header:
            if line.startswith("    "):
                inputs[text.strip().rstrip(",")] = comment.strip()
            header = line != "):"
        elif line.startswith("    # "):
            site = line[6:] if line[6:] != "(model)" else ""
        elif (name := text.strip().partition(" = ")[0]) != text.strip():
            kind, _, rule = comment.partition("<-")
            nodes.append(Node(name, text.strip(), kind.strip(), site, rule.strip()))
    return inputs, nodes


_TOKEN = re.compile(
    r"""(?P<s>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")   # string
      | (?P<c>\#.*|<-.*)                              # comment, rule
      | (?P<n>(?<![\w.])\d[\w.]*)                     # number
      | (?P<k>\b(?:None|True|False|def|return|save|recompute)\b|(?<!\.)\b\w+(?==[^=]))
      | (?P<f>\b[A-Za-z_]\w*(?=\())                   # what is called
      | (?P<a>(?<=\.)[A-Za-z_]\w*)                    # attribute
      | (?P<v>\b[A-Za-z_]\w*\b)                       # node
    """,
    re.VERBOSE,
)
_GRAFTED = re.compile(rf"^(?P<head>.*?)(?P<hide>{ADAPTERS}_)(?P<tail>\w+)$")
_STORED = re.compile(r"^(?P<head>.*?)(?P<hide>parametrizations_)(?P<tensor>\w+?)(?P<hide2>_original)(?P<tail>\d*)$")


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) pairs that join to `text`.

    Kinds: s string, c comment, n number, k keyword, f function, a attribute, v node, '' the rest.
    """
    at = 0
    for match in _TOKEN.finditer(text):
        if match.start() > at:
            yield "", text[at : match.start()]
        at = match.end()
        yield str(match.lastgroup), match.group()
    if at < len(text):
        yield "", text[at:]


def relative(text: str, site: str) -> Iterator[tuple[str, str]]:
    """`tokens`, with kind p for the parts of a node's name that only repeat its site or say how it is attached."""
    prefixes = _prefixes(site)
    for kind, part in tokens(text):
        if kind == "v":
            yield from _name(part, prefixes)
        else:
            yield kind, part


def short(text: str, site: str = "") -> str:
    """`text` with the names of nodes relative to a site, or to the nearest module that they share with it.

    >>> short("y = linear(x, model_layers_0_q_adapters_lora_A)", "model.layers.0.q")
    'y = linear(x, lora_A)'
    """
    return "".join(part for kind, part in relative(text, site) if kind != "p")


def references(text: str, known: Collection[str]) -> list[str]:
    """The known nodes that a line reads, in order, each once.

    >>> references("add = add(linear, h, alpha=1)", {"add", "linear", "h"})
    ['linear', 'h']
    """
    value = text.partition(" = ")[2]
    return list(dict.fromkeys(part for kind, part in tokens(value) if kind == "v" and part in known))


def operator(text: str) -> str:
    """What a line calls: `y = x.split([4], dim=-1)` -> `split`."""
    return next((part for kind, part in tokens(text.partition(" = ")[2]) if kind == "f"), "")


def _prefixes(site: str) -> list[str]:
    """How the names of parameters start at a site, and at the modules that it is in; of `a.b.[q,v]`, at `a.b`."""
    parts = re.split(r"\W", site.partition(".[")[0])
    return ["_".join(parts[:i]) + "_" for i in range(len(parts), 0, -1) if parts[0]]


def _name(name: str, prefixes: list[str]) -> Iterator[tuple[str, str]]:
    prefix = next((p for p in prefixes if name.startswith(p) and len(name) > len(p)), "")
    if prefix:
        yield "p", prefix
        name = name[len(prefix) :]
    if match := _STORED.match(name) or _GRAFTED.match(name):
        for group, part in match.groupdict().items():
            if part:
                yield "p" if group.startswith("hide") else "v", part
    else:
        yield "v", name
