"""Methods as text: for the command line, and the table of docs/methods.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rewrite.bind import Argument, arguments
from rewrite.method import Method
from rewrite.table import table


def described(method: type[Method]) -> str:
    """A method's equation, its sites, its arguments and where it comes from."""
    lines = [f"{method.name}: {equation(method)}"]
    default = f", by default @{method.default_sites}" if method.default_sites else ""
    lines.append(f"  on {_kinds(method)}{default}")
    known = arguments(method)
    if known:
        rows = [("argument", "default", "wants", ""), *(_row(argument) for argument in known)]
        lines += [f"  {line}" for line in table(rows)]
    for argument in known:
        if isinstance(argument.choices, Mapping):
            lines += [f"  {argument.name}={name}: {text}" for name, text in _choices(argument.choices)]
    return "\n".join([*lines, *([f"  {method.paper}"] if method.paper else [])])


def equation(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0].strip()


def _kinds(method: type[Method]) -> str:
    return ", ".join(sorted(method.kinds)) or "the whole model"


def _row(argument: Argument) -> tuple[str, str, str, str]:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    limits = [f"{words[key]} {value}" for key, value in argument.limits.items() if value is not None]
    return argument.name, _spelled(argument.default), ", ".join([argument.wants, *limits]), argument.help


def _choices(choices: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    """(choice, what it does); a choice with arguments of its own shows them in parentheses."""
    for name, cls in choices.items():
        inner = ", ".join(f"{a.name}={_spelled(a.default)}" for a in arguments(cls))
        yield (f"{name}({inner})" if inner else name), equation(cls)


def _spelled(value: Any) -> str:
    """A default as it is written in a spec."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return type(value).__name__.lower() if dataclasses.is_dataclass(value) else str(value)


def page(methods: Iterable[type[Method]]) -> str:
    """A Markdown table of methods: formula, arguments, what they stand at, where they come from."""
    rows = [f"| {' | '.join(_cells(method))} |" for method in methods]
    return "\n".join(["| method | what it computes | arguments | stands at |", "|---|---|---|---|", *rows])


def _cells(method: type[Method]) -> tuple[str, str, str, str]:
    given = " ".join(f"{a.name}={_spelled(a.default)}" for a in arguments(method))
    sites = _kinds(method)
    default = f", by default `@{method.default_sites}`" if method.default_sites else ""
    formula = equation(method).replace("|", "\\|")
    return (
        f"[`{method.name}`]({method.paper})" if method.paper else f"`{method.name}`",
        formula,
        f"`{given}`" if given else "",
        sites + default,
    )
