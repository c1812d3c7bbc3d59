"""Typed nodes: plain-PyTorch functions that Dynamo keeps as one node of the captured graph.

A typed function carries its own meaning: passes never have to recognise an adapter from matmuls, they ask
`typed_op(node.target)` and lower the node through `reference`.  A node that no pass lowers is still right,
because AOTAutograd traces through it.  Nothing here knows of methods, sites or specs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["branch", "weight", "storage", "tokens", "keep"]
"""What a typed node stands for: `branch(x, y, *theta) -> y'` changes the output of a layer,
`weight(W, *theta) -> W'` reparameterises a weight, `storage(*stored) -> W` decodes one, `tokens(*theta)` makes what a
model reads in front of its input, `keep(x) -> x` marks a module that a rule about saved values is about."""


@dataclass(frozen=True)
class TypedOp:
    """The meaning of a typed node: its name in graphs, its kind, and its definition in plain PyTorch."""

    name: str
    kind: Kind
    reference: Callable[..., Any]


def typed(name: str, kind: Kind, reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` as a function that a captured graph shows as one call named `name`.

    >>> double = typed("double", "weight", lambda w: 2 * w)
    >>> double(torch.ones(2))
    tensor([2., 2.])
    >>> typed_op(double).name
    'double'
    """

    def node(*args: Any, **kwargs: Any) -> Any:
        return reference(*args, **kwargs)

    node.__name__ = node.__qualname__ = name
    node.typed_op = TypedOp(name, kind, reference)  # type: ignore[attr-defined]
    torch.compiler.allow_in_graph(node)
    return node


def typed_op(target: object) -> TypedOp | None:
    """The `TypedOp` behind a node's target; None for every other target."""
    return getattr(target, "typed_op", None)
