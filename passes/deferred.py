"""What a graph returns but need not compute: logits beside a loss, as a program that runs when somebody reads them.

The graph returns the head's input instead; the program makes the logits from it and from inputs of the graph, with
the model's own operators.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from rewrite.passes.builder import example
from rewrite.passes.head import Unknown, find
from rewrite.passes.record import Edit, GraphRecord
from rewrite.passes.rule import line, site

_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_MARK = "deferred"
_EQUATION = "return linear(x, W, b) -> return x; the logits are computed when they are read"


@dataclass(frozen=True)
class Deferred:
    """One output of a graph that a program computes when it is read.

    `program(*cut, *inputs)`: `cut` are the positions of its activations among the graph's outputs, `inputs` those of
    parameters and the like among the graph's inputs.  The result has the leading sizes of the first activation, then
    `classes`, in `dtype`.
    """

    output: int
    cut: tuple[int, ...]
    inputs: tuple[int, ...]
    program: fx.GraphModule
    classes: int
    dtype: torch.dtype


def mark(product: fx.Node, cut: Sequence[fx.Node]) -> None:
    """Let a head's product be computed when it is read, from the activations `cut` and inputs of the graph."""
    product.meta[_MARK] = tuple(cut)


def between(node: fx.Node, cut: Sequence[fx.Node]) -> list[fx.Node]:
    """Everything that a node is computed from, the activations `cut` and what they need aside, in program order."""
    found, stack = set(), [node]
    while stack:
        last = stack.pop()
        if last not in found:
            found.add(last)
            stack += [] if last in cut else last.all_input_nodes
    return sorted(found)


def split(gm: fx.GraphModule, record: GraphRecord) -> list[Deferred]:
    """Take marked products out of a graph that only returns them; its last outputs are what the programs need more."""
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    results = list(output.args[0])  # type: ignore[arg-type]
    count, later, unread = len(results), [], []
    for at, node in enumerate(results[:count]):
        product = _marked(node)
        if product is None:
            continue
        cut = product.meta[_MARK]
        results[at] = cut[0]
        results += cut[1:]
        positions = (at, *range(len(results) - len(cut) + 1, len(results)))
        inputs, program = _program(gm, node, cut)
        value = example(node)
        later.append(Deferred(at, positions, inputs, program, int(value.shape[-1]), value.dtype))
        _record(record, node, product, cut)
        unread += [n for n in reversed(between(node, cut)) if n.op != "placeholder" and n not in cut]
    if later:
        output.args = (tuple(results),)
        for node in unread:
            if not node._erased and not node.users:
                gm.graph.erase_node(node)
        gm.recompile()
    return later


def _marked(node: object) -> fx.Node | None:
    """The marked product behind an output."""
    try:
        product = find(node).node
    except Unknown:
        return None
    return product if _MARK in product.meta else None


def _program(gm: fx.GraphModule, node: fx.Node, cut: Sequence[fx.Node]) -> tuple[tuple[int, ...], fx.GraphModule]:
    """The positions of the graph's inputs that a program reads, and the program."""
    graph, new = fx.Graph(), {}
    needed = between(node, cut)
    for part in cut:
        new[part] = graph.placeholder(part.name)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = tuple(i for i, n in enumerate(placeholders) if n in needed and n not in cut)
    for i in inputs:
        new[placeholders[i]] = graph.placeholder(placeholders[i].name)
    for each in gm.graph.nodes:  # regions of autocast as they are: they decide in which dtype a product runs
        if each not in new and (each in needed or each.target in _AUTOCAST):
            new[each] = graph.node_copy(each, lambda n: new[n])
    graph.output(new[node])
    graph.lint()
    # Not the captured module: a program must not keep what it does not read.
    root = {n.target: copy.copy(getattr(gm, str(n.target))) for n in graph.nodes if n.op == "get_attr"}
    return inputs, fx.GraphModule(root, graph)


def _record(record: GraphRecord, node: fx.Node, product: fx.Node, cut: Sequence[fx.Node]) -> None:
    edit = Edit(
        "defer_logits", site([product]), _EQUATION, "passes/deferred.py", (line(product),), (f"return {cut[0].name}",)
    )
    record.passes[-1].edits.append(edit)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "dropout" in str(node.target)
