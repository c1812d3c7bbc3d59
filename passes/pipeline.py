"""The pipeline: one tuple of passes, read top-down, and the runner that applies it.

After each pass, once, here: lint, verify, and (with `REWRITE_DUMP=dir`) the graph as a readable program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from rewrite.codegen.typed import typed_op
from rewrite.errors import RewriteError
from rewrite.passes import keep
from rewrite.passes.batch import BATCH
from rewrite.passes.canonical import CANONICAL
from rewrite.passes.coarse import coarse
from rewrite.passes.dump import dump, program
from rewrite.passes.factor import FACTOR, OPEN, ROWS, note_dense, sweep
from rewrite.passes.fuse import FUSE, branch, fuse_scale
from rewrite.passes.insert import insert, is_typed
from rewrite.passes.loss import LOSS
from rewrite.passes.operators import add, decode, inserted
from rewrite.passes.record import GraphRecord, PassRecord
from rewrite.passes.rule import Rule, apply_rule, apply_rules
from rewrite.passes.segment import SEGMENT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """A named sequence of rules, each applied in one walk; several in brackets share one and feed one another.

    A pass may assume a graph that `verify` accepts and must leave one.
    """

    name: str
    rules: tuple[Rule | tuple[Rule, ...], ...]


PIPELINE = (
    Pass("insert", (insert,)),
    Pass("canonical", CANONICAL),
    Pass("factor", (*OPEN, FACTOR, *ROWS)),
    Pass("batch", BATCH),
    Pass("fuse", (*FUSE, *SEGMENT, fuse_scale)),
    Pass("loss", LOSS),
)


def without(name: str) -> tuple[Pass, ...]:
    """The pipeline without one of its passes."""
    return tuple(step for step in PIPELINE if step.name != name)


def run(gm: fx.GraphModule, record: GraphRecord, pipeline: tuple[Pass, ...] = PIPELINE) -> GraphRecord:
    """Apply the pipeline to a graph in place; every node must carry `meta["example_value"]`.

    Returns `record` with one `PassRecord` per pass, the programs before and after, and notes on fallbacks.
    """
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]  # checkpointed regions are inside
    graphs = [part.graph for part in parts]
    record.rules = keep.collect(graphs)
    for graph in graphs:
        drop_unread(graph)
    record.nodes_before, record.before = _nodes(graphs), _programs(graphs, "captured")
    dump(record, 0, "captured", record.before)
    text = record.before
    for number, step in enumerate(pipeline, 1):
        done = PassRecord(step.name)
        begin = time.perf_counter()
        for rule in step.rules:
            for graph in graphs:
                _apply(graph, rule, done, record)
        for graph in graphs:
            sweep(graph)
        done.seconds = time.perf_counter() - begin
        for graph in graphs:
            graph.lint()
            verify(graph, step)
        record.passes.append(done)
        heading = f"after {step.name}: {len(done.edits)} edits, {done.seconds * 1e3:.1f} ms"
        log.info("%s, %s", record.title, heading)
        if done.edits:
            text = _programs(graphs, heading)
            log.debug("%s", text)
        dump(record, number, step.name, text)
    keep.label(graphs, record.rules)
    if any(isinstance(rule, keep.Coarse) for _, rule in record.rules):
        record.passes.append(coarse(graphs, record))
    for part in parts:
        part.recompile()
        note_dense(part.graph, record)
        _note_unfused(part.graph, record)
    record.nodes_after, record.after = _nodes(graphs), text
    return record


def _apply(graph: fx.Graph, rules: Rule | tuple[Rule, ...], done: PassRecord, record: GraphRecord) -> None:
    if isinstance(rules, Rule):
        apply_rule(graph, rules, done, record)
    else:
        apply_rules(graph, rules, done, record)


def _nodes(graphs: Sequence[fx.Graph]) -> int:
    return sum(len(graph.nodes) for graph in graphs)


def _programs(graphs: Sequence[fx.Graph], heading: str) -> str:
    first, *inner = graphs
    texts = [program(graph, f"checkpointed region {number}") for number, graph in enumerate(inner)]
    return "\n".join([program(first, heading), *texts])


def drop_unread(graph: fx.Graph) -> None:
    """Erase weights that nothing reads: a model that asks for the dtype of a stored weight decodes it for that."""
    for node in reversed(graph.nodes):
        op = typed_op(node.target)
        if op is not None and op.kind != "branch" and not node.users:  # a branch may draw random numbers
            graph.erase_node(node)


def verify(graph: fx.Graph, step: Pass) -> None:
    """What every pass must leave: new nodes that know their value, no typed node once `insert` has run."""
    for node in graph.nodes:
        if "rule" in node.meta and "example_value" not in node.meta:
            raise RewriteError(f"pass {step.name} left {node.name} without a shape; please report this graph")
        if is_typed(node):
            raise RewriteError(f"pass {step.name} left the typed node {node.name} at {node.meta.get('site')}")


def _note_unfused(graph: fx.Graph, record: GraphRecord) -> None:
    """What was inserted and is still there runs as plain operators: say so, once per site."""
    told = {n.site for n in record.notes}
    for node in graph.nodes:
        place = str(node.meta.get("site", ""))
        sides = add.arguments(node)
        left = branch.match(sides[1], {}, []) if sides else decode.arguments(node)
        if inserted(node) and left is not None and node.users and place not in told:
            record.note(place, "not fused: no pattern for its layer or its formula; plain operators instead")
            told.add(place)
