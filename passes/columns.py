"""columns: on the backward graph for a CPU, sums over rows of a product become one operator.

The gradient of a scale of every output (DoRA's magnitude, the vectors of IA3 and VeRA) is such a sum.  Inductor fuses
it with what made its operands and walks down the columns, computing them one number at a time: in a step of a small
Llama under DoRA, 15 ms for every pair of gate and up, where the same numbers in rows took 2.  After the partition, for
which an operator that nothing fuses with would change what is saved.
"""

from __future__ import annotations

import torch
from torch import fx

from rewrite.passes.accumulate import alike
from rewrite.passes.counting import module_path
from rewrite.passes.gradients import backward_nodes
from rewrite.passes.record import Edit, PassRecord

aten = torch.ops.aten
_SOURCE = "passes/columns.py"
_EQUATION = "sum(a * b, rows)  ->  column_sums(a, b)"


def columns(graph: fx.Graph) -> PassRecord:
    """Replace every sum of `a * b` over all but the last dimension, on a CPU, that depends on a gradient."""
    record = PassRecord("columns")
    backward = backward_nodes(graph)
    for node in list(graph.nodes):
        operands = _operands(node) if node in backward else None
        if operands is None:
            continue
        with graph.inserting_before(node):
            total = graph.call_function(torch.ops.rewrite.column_sums.default, operands)
            total.meta = dict(node.meta)
            total.meta["val"] = result = node.meta["val"].flatten()
            new = total
            for _ in range(node.meta["val"].ndim - 1):  # kept dimensions
                new = graph.call_function(aten.unsqueeze.default, (new, 0))
                new.meta = {**node.meta, "val": new.args[0].meta["val"].unsqueeze(0)}  # type: ignore[union-attr]
        product = node.args[0]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if not product.users:  # type: ignore[union-attr]
            graph.erase_node(product)  # type: ignore[arg-type]
        lines = f"sum({operands[0].name} * {operands[1].name}, rows)", f"{total.name} = column_sums"
        text = f"  # {tuple(result.shape)}"
        record.edits.append(Edit("columns", module_path(total), _EQUATION, _SOURCE, (lines[0],), (lines[1] + text,)))
    return record


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors, of one shape and dtype on a CPU, whose product a node sums over its rows."""
    if node.target is not aten.sum.dim_IntList or node.kwargs:
        return None
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    a, b = product.args
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (product, a, b)]
    known = [v for v in values if isinstance(v, torch.Tensor)]
    if len(known) < 3 or known[0].ndim < 2 or known[0].device.type != "cpu":
        return None
    rows = {d % known[0].ndim for d in node.args[1]}  # type: ignore[union-attr]
    if rows != set(range(known[0].ndim - 1)) or not all(alike(known[0], v) for v in known[1:]):
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return a, b
