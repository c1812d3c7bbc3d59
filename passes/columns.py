"""columns: on graphs for a CPU, what scales every output of a layer is computed once, and its gradient row by row.

- The gradient of such a scale (DoRA's magnitude, the vectors of IA3 and VeRA) is a sum over rows of a product.
  Inductor fuses it with what made its operands and walks down the columns, computing them one number at a time: in a
  step of a small Llama under DoRA, 15 ms for every pair of gate and up, where the same numbers in rows took 2.
  Where nothing else reads the gradient of the output, the same pass scales it, for what is before: in its place, while
  a product that something else fuses with would have to be written beside it.
- A scale that is a quotient (DoRA's magnitude over its norm) would be divided again for every row.

After the partition, for which an operator that nothing fuses with would change what is saved.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from rewrite.passes.accumulate import alike
from rewrite.passes.counting import module_path
from rewrite.passes.gradients import backward_nodes
from rewrite.passes.record import Edit, PassRecord

aten = torch.ops.aten
OPS = torch.ops.rewrite
_SOURCE = "passes/columns.py"
_SUM = "sum(a * b, rows)  ->  column_sums(a, b)"
_SCALED = "a * d, column_sums(a, b)  ->  scaled_sums(a, b, d)"
_QUOTIENT = "x * (a / b)  ->  x * quotient(a, b)"


def columns(graph: fx.Graph) -> PassRecord:
    """Sums over rows of products that depend on a gradient, and quotients that scale rows; a record of the edits."""
    record = PassRecord("columns")
    backward = backward_nodes(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node in backward and (operands := _operands(node)):
            scaling = _scaling(node, operands, order)
            record.edits.append(_scaled(graph, node, *scaling) if scaling else _sum(graph, node, *operands))
        elif _is_quotient(node):
            node.target = OPS.quotient.default
            text = f"  # {tuple(node.meta['val'].shape)}"
            record.edits.append(_edit(node, _QUOTIENT, f"{node.name} = div", f"{node.name} = quotient{text}"))
    return record


def _edit(node: fx.Node, equation: str, before: str, after: str) -> Edit:
    return Edit("columns", module_path(node), equation, _SOURCE, (before,), (after,))


def _sum(graph: fx.Graph, node: fx.Node, a: fx.Node, b: fx.Node) -> Edit:
    """Replace a sum over all but the last dimension of `a * b`."""
    with graph.inserting_before(node):
        total = graph.call_function(OPS.column_sums.default, (a, b))
    total.meta = {**node.meta, "val": node.meta["val"].flatten()}
    _replace(graph, node, total)
    text = f"  # {tuple(total.meta['val'].shape)}"
    return _edit(total, _SUM, f"sum({a.name} * {b.name}, rows)", f"{total.name} = column_sums{text}")


def _scaled(graph: fx.Graph, node: fx.Node, a: fx.Node, b: fx.Node, scaling: fx.Node, first: fx.Node) -> Edit:
    """Replace a sum over all but the last dimension of `a * b`, and what scales a, where the `first` of both is."""
    d = _other(scaling, a)
    with graph.inserting_before(first):
        both = graph.call_function(OPS.scaled_sums.default, (a, b, d))
        scaled, total = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    scaled.meta, total.meta = scaling.meta, {**node.meta, "val": node.meta["val"].flatten()}
    both.meta = {**scaling.meta, "val": (scaled.meta["val"], total.meta["val"])}
    _replace(graph, node, total)
    scaling.replace_all_uses_with(scaled)
    graph.erase_node(scaling)
    before = f"{scaling.name} = {a.name} * {d.name}, sum({a.name} * {b.name}, rows)"
    return _edit(both, _SCALED, before, f"{both.name} = scaled_sums  # {tuple(scaled.meta['val'].shape)}")


def _replace(graph: fx.Graph, node: fx.Node, total: fx.Node) -> None:
    """Let a sum over the rows of a product, which may keep their dimensions, be `total`."""
    new = total
    with graph.inserting_before(node):
        for _ in range(node.meta["val"].ndim - 1):
            new = graph.call_function(aten.unsqueeze.default, (new, 0))
            new.meta = {**node.meta, "val": new.args[0].meta["val"].unsqueeze(0)}  # type: ignore[union-attr]
    product = node.args[0]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not product.users:  # type: ignore[union-attr]
        graph.erase_node(product)  # type: ignore[arg-type]


def _scaling(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], order: dict[fx.Node, int]
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(a, b, what scales every row of a, the first of it and of the sum), if nothing else reads a.

    Then a need not be kept beside what it becomes.  What others read as well is better scaled where it is computed.
    """
    for a, b in (operands, operands[::-1]):
        others = [user for user in a.users if user is not node.args[0]]
        if a is b or len(others) != 1 or not _is_scaled(others[0], a):
            continue
        first = min(node, others[0], key=order.__getitem__)
        if all(order.get(n, len(order)) < order[first] for n in (b, _other(others[0], a))):
            return a, b, others[0], first
    return None


def _is_scaled(node: fx.Node, a: fx.Node) -> bool:
    """Whether a node is `a * d`, d a vector of a's dtype."""
    if node.target is not aten.mul.Tensor or node.kwargs or not isinstance(d := _other(node, a), fx.Node):
        return False
    x, value = a.meta["val"], d.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == x.dtype and value.shape == x.shape[-1:]


def _other(product: fx.Node, a: fx.Node) -> fx.Node:
    return product.args[1] if product.args[0] is a else product.args[0]  # type: ignore[return-value]


def _is_quotient(node: fx.Node) -> bool:
    """A quotient of vectors on a CPU that multiplies something of more rows."""
    if node.target is not aten.div.Tensor or node.kwargs:
        return False
    scales = any(u.target is aten.mul.Tensor and u.meta["val"].ndim > 1 for u in node.users)
    return scales and node.meta["val"].ndim == 1 and _alike_on_cpu(node)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors, of one shape and dtype on a CPU, whose product a node sums over its rows."""
    if node.target is not aten.sum.dim_IntList or node.kwargs:
        return None
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    if not _alike_on_cpu(product) or (dims := product.meta["val"].ndim) < 2:
        return None
    if {d % dims for d in node.args[1]} != set(range(dims - 1)):  # type: ignore[union-attr]
        return None
    return product.args  # type: ignore[return-value]


def _alike_on_cpu(node: fx.Node) -> bool:
    """Whether a node of two operands and they are tensors of one shape and dtype, on a CPU."""
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node, *node.args)]
    known = [v for v in values if isinstance(v, torch.Tensor)]
    return len(known) == 3 and known[0].device.type == "cpu" and all(alike(known[0], v) for v in known[1:])
