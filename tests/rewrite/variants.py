"""Calls of a method with its defaults and with every argument changed on its own, read off its dataclass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import rewrite
from rewrite.bind import Argument, arguments


def variants(cls: type) -> Iterator[str]:
    """The arguments of a method as the spec spells them: none, and each of them at other values."""
    yield ""
    for argument in arguments(cls):
        for value in others(argument):
            yield f"{argument.name}={value}"


def others(argument: Argument) -> Iterator[str]:
    """Values of an argument that are not its default."""
    known = argument.choices or ()
    yield from (name for name in known if not is_default(argument, name))
    if isinstance(known, Mapping):
        for name, cls in known.items():
            yield from (f"{name}({inner})" for inner in variants(cls) if inner)
    options = set(argument.wants.split(" or "))
    if "true or false" in argument.wants:
        yield str(not argument.default).lower()
    if {"an int", "a float"} & options:
        low, high = argument.limits.get("low"), argument.limits.get("high")
        number = int(low or 2) if "an int" in options else min(0.5, high or math.inf)
        if number != argument.default:
            yield str(number)
    if "a tuple" in argument.wants and "an int" in argument.wants:
        yield "(1, 3)"
    for option in options:
        if option.startswith("one of ") and not known:
            yield from (name for name in option.removeprefix("one of ").split(", ") if name != argument.default)


def is_default(argument: Argument, name: str) -> bool:
    default = argument.default
    return name == default or (isinstance(argument.choices, Mapping) and type(default) is argument.choices[name])


def binds(call: str) -> bool:
    """Whether a method takes these arguments together, wherever it stands."""
    try:
        rewrite.parse(f"{call}@base")
    except rewrite.SpecError:
        return False
    return True
