"""Patterns over fx nodes: data that says which operators, in which arrangement, a rule rewrites.

`Op` names one operator under every spelling that a captured graph may use.  Calling an `Op` makes a pattern:
strings capture, the same string twice means the same node, missing trailing arguments capture None, and inner
nodes must have a single user (otherwise the rewrite would compute them twice), unless they are `shared`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

Captures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Op:
    """One operator in all its spellings, with the names of its parameters.

    >>> import torch, torch.nn.functional as F
    >>> Op("linear", ("input", "weight", "bias"), F.linear, torch.ops.aten.linear.default)("x", "w", "b")
    linear(x, w, b)
    """

    name: str
    parameters: tuple[str, ...]
    targets: frozenset[Any]
    methods: frozenset[str]

    def __init__(self, name: str, parameters: tuple[str, ...], *targets: Any, methods: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "targets", frozenset(targets))
        object.__setattr__(self, "methods", frozenset(methods))

    def __call__(self, *arguments: Any) -> Call:
        return Call(self, arguments)

    def arguments(self, node: object) -> list[Any] | None:
        """The node's arguments in the order of `parameters`, None for absent ones; None if it is another op."""
        if not isinstance(node, fx.Node):
            return None
        if not (
            (node.op == "call_function" and node.target in self.targets)
            or (node.op == "call_method" and node.target in self.methods)
        ):
            return None
        if len(node.args) > len(self.parameters) or not set(node.kwargs) <= set(self.parameters):
            return None
        given = dict(zip(self.parameters, node.args, strict=False)) | dict(node.kwargs)
        return [given.get(name) for name in self.parameters]

    def __repr__(self) -> str:
        return self.name


class Pattern:
    """Something that a node either matches, with captures, or does not."""

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        """The captures extended by this match, or None; `matched` collects the nodes of the match."""
        raise NotImplementedError

    def names(self) -> set[str]:
        """The names that this pattern captures."""
        raise NotImplementedError


@dataclass(frozen=True)
class Call(Pattern):
    """An operator applied to patterns, captures (strings) and literals."""

    op: Op
    args: tuple[Any, ...]

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        values = self.op.arguments(node)
        if values is None or len(self.args) > len(values) or not (root or len(node.users) == 1):
            return None
        if any(value is not None for value in values[len(self.args) :]):
            return None
        for pattern, value in zip(self.args, values, strict=False):
            found = _match(pattern, value, captures, matched)
            if found is None:
                return None
            captures = found
        matched.append(node)
        return captures

    def names(self) -> set[str]:
        return set().union(*(_names(a) for a in self.args)) if self.args else set()

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(a if isinstance(a, str) else repr(a) for a in self.args)})"


@dataclass(frozen=True)
class AnyOf(Pattern):
    """The first alternative that matches; captures of the others stay absent."""

    alternatives: tuple[Any, ...]

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        for alternative in self.alternatives:
            trial: list[fx.Node] = []
            found = (
                alternative.match(node, captures, trial, root)
                if isinstance(alternative, Pattern)
                else _match(alternative, node, captures, trial)
            )
            if found is not None:
                matched.extend(trial)
                return found
        return None

    def names(self) -> set[str]:
        return set().union(*(_names(a) for a in self.alternatives))

    def __repr__(self) -> str:
        return f"any_of({', '.join(a if isinstance(a, str) else repr(a) for a in self.alternatives)})"


def any_of(*alternatives: Any) -> AnyOf:
    """A pattern that matches where one of the alternatives does, tried in order."""
    return AnyOf(alternatives)


@dataclass(frozen=True)
class Where(Pattern):
    """Any node for which a predicate holds, captured under one name; its description prints."""

    name: str
    holds: Callable[[fx.Node], bool]
    description: str

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        if not isinstance(node, fx.Node) or not self.holds(node):
            return None
        matched.append(node)
        return _bind(self.name, node, captures)

    def names(self) -> set[str]:
        return {self.name}

    def __repr__(self) -> str:
        return self.description


@dataclass(frozen=True)
class Shared(Pattern):
    """A call that may have other users: for rewrites that look past it, and do not compute it again."""

    call: Call

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        return self.call.match(node, captures, matched, root=True)

    def names(self) -> set[str]:
        return self.call.names()

    def __repr__(self) -> str:
        return repr(self.call)


def shared(call: Call) -> Shared:
    """A pattern that matches a call whoever else uses it."""
    return Shared(call)


def _names(pattern: Any) -> set[str]:
    if isinstance(pattern, str):
        return {pattern}
    return pattern.names() if isinstance(pattern, Pattern) else set()


def _match(pattern: Any, value: Any, captures: Captures, matched: list[fx.Node]) -> Captures | None:
    if isinstance(pattern, str):
        return _bind(pattern, value, captures)
    if isinstance(pattern, Pattern):
        return pattern.match(value, captures, matched)
    return captures if type(value) is type(pattern) and value == pattern else None


def _bind(name: str, value: Any, captures: Captures) -> Captures | None:
    if name not in captures:
        return {**captures, name: value}
    return captures if captures[name] is value else None
