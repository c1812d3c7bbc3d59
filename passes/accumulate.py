"""accumulate: on the joint graph, products that a backward adds up become one sum, in place.

The gradient of an input that several layers and branches share (q, k, v and their adapters) is a sum of products of
one shape.  Added one by one, every product is written, and read again with the sum.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rewrite.passes.counting import module_path
from rewrite.passes.gradients import backward_nodes
from rewrite.passes.record import Edit, PassRecord

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SOURCE = "passes/accumulate.py"
_EQUATION = "dy W + dh A + ...  ->  sum_of_products([dy, dh, ...], [W, A, ...])"
_PRODUCT = aten.mm.default
_GRADIENTS = torch.ops.rewrite.dropped_linear_gradients.default


@dataclass(frozen=True)
class _Leaf:
    """What is added: a value, and the product (or gradient behind dropout) that it is a view of, if it is one."""

    value: fx.Node
    product: fx.Node | None = None

    def operand(self, index: int) -> fx.Node:
        found = self.product.args[index] if self.product is not None else None
        assert isinstance(found, fx.Node)
        return found


def accumulate(graph: fx.Graph) -> PassRecord:
    """Replace every sum of two products and more that depends on a gradient; returns the record of its edits."""
    record, seen = PassRecord("accumulate"), set()
    backward = backward_nodes(graph)
    for node in reversed(list(graph.nodes)):
        if node in seen or node not in backward or not _is_sum(node):
            continue
        leaves, inner = _leaves(node)
        seen |= inner
        products = sum(leaf.product is not None and leaf.product.target is _PRODUCT for leaf in leaves)
        if products > 1 or (products and any(_is_dropped(leaf.product) for leaf in leaves)):
            record.edits.append(_replace(graph, node, leaves, inner))
    record.edits.reverse()
    return record


def _is_sum(node: fx.Node) -> bool:
    """An addition of two tensors of one shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node, *node.args)]
    known = [v for v in values if isinstance(v, torch.Tensor)]
    return len(known) == 3 and all(alike(known[0], value) for value in known[1:])


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One dtype, and one shape whatever its symbols are."""
    sizes = zip(a.shape, b.shape, strict=False)
    return a.dtype == b.dtype and a.ndim == b.ndim and all(statically_known_true(m == n) for m, n in sizes)


def _leaves(root: fx.Node) -> tuple[list[_Leaf], set[fx.Node]]:
    """What a tree of additions adds up, from left to right, and the additions; those with other readers are leaves."""
    leaves: list[_Leaf] = []
    inner = {root}

    def visit(value: fx.Node) -> None:
        if value is root or (_is_sum(value) and len(value.users) == 1):
            inner.add(value)
            for part in value.args:
                visit(part)  # type: ignore[arg-type]
        else:
            leaves.append(_Leaf(value, _product(value)))

    visit(root)
    return leaves, inner


def _product(value: fx.Node) -> fx.Node | None:
    """The product of matrices, or gradient behind dropout, that a value is or is a view of; nothing else reads it."""
    node = value.args[0] if value.target in _VIEWS else value
    assert isinstance(node, fx.Node)
    alone = len(value.users) == 1 and len(node.users) == 1
    return node if alone and (node.target is _PRODUCT or _is_dropped(node)) else None


def _is_dropped(node: fx.Node | None) -> bool:
    """The gradient of an input behind dropout."""
    if node is None or node.target is not operator.getitem or node.args[1] != 0:
        return False
    return node.args[0].target is _GRADIENTS  # type: ignore[union-attr]


def _replace(graph: fx.Graph, root: fx.Node, leaves: Sequence[_Leaf], inner: Collection[fx.Node]) -> Edit:
    products = [leaf for leaf in leaves if leaf.product is not None and leaf.product.target is _PRODUCT]
    products.sort(key=lambda leaf: -leaf.operand(0).meta["val"].shape[1])  # the long ones first
    dropped = [leaf for leaf in leaves if _is_dropped(leaf.product)][:1]
    taken = [*products, *dropped]
    before = tuple(_line(leaf.product) for leaf in taken if leaf.product is not None)
    with graph.inserting_before(root):
        rest = _without_input_gradient(graph, dropped[0].operand(0)) if dropped else ()
        operands = [[leaf.operand(i) for leaf in products] for i in range(2)]
        total = _like(graph.call_function(torch.ops.rewrite.sum_of_products.default, (*operands, *rest)), products[0])
        value = products[0].value
        result = total
        if value is not products[0].product:  # the view that the product had
            result = _like(graph.call_function(aten.view.default, (total, value.args[1])), value)
        for leaf in leaves:
            if leaf not in taken:
                result = _like(graph.call_function(aten.add.Tensor, (result, leaf.value)), root)
    root.replace_all_uses_with(result)
    _erase(graph, [*inner, *(leaf.value for leaf in taken)])
    return Edit("accumulate", module_path(root), _EQUATION, _SOURCE, before, (_line(total),))


def _without_input_gradient(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...]:
    """Tell a gradient behind dropout not to compute that of x; returns dh, A, seed, ranks and p, of which it is."""
    dh, x, A, seed, ranks, p, _ = node.args
    node.args = dh, x, A, seed, ranks, p, False
    none, dA = node.meta["val"]
    node.meta["val"] = none.new_empty(0), dA
    return dh, A, seed, ranks, p


def _like(node: fx.Node, other: fx.Node | _Leaf) -> fx.Node:
    """Give a node the meta of another with a value of the same shape."""
    other = other if isinstance(other, fx.Node) else other.product or other.value
    node.meta = dict(other.meta)
    return node


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase what nobody reads, and what only that read, from the given nodes upwards."""
    waiting, gone = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node.users or node.op != "call_function" or node in gone:
            continue
        waiting += node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)


def _line(node: fx.Node) -> str:
    if _is_dropped(node):
        node = node.all_input_nodes[0]
    shapes = " ".join(str(tuple(n.meta["val"].shape)) for n in node.all_input_nodes)
    return f"{node.name} = {str(node.target).removeprefix('aten.').removesuffix('.default')}  # {shapes}"
