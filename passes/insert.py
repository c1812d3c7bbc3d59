"""insert: lowers typed nodes into the operators of their definition.

After this pass no typed node is left, so every later pass and AOTAutograd's cache see torch operators alone.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from rewrite.codegen.typed import typed_op
from rewrite.passes.pattern import Where
from rewrite.passes.rule import rule


def is_typed(node: fx.Node) -> bool:
    """Whether a node calls a typed function."""
    return node.op == "call_function" and typed_op(node.target) is not None


@rule(Where("node", is_typed, "typed(x, y, *theta)"))
def insert(r: Any, node: Any) -> Any:
    """typed(x, y, *theta)  ->  its definition in torch operators, e.g. y + linear(linear(x, A) * s, B)"""
    op = typed_op(node.node.target)
    assert op is not None
    return op.reference(*r.proxy(node.node.args), **r.proxy(node.node.kwargs))
