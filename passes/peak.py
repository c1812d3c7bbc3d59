"""The memory of a step over its schedule: what is alive while each operator of a partitioned graph runs.

An operator allocates what it returns; a storage lives until its last reader has run, results of the step and what is
kept for the backward longer.  Parameters and inputs are not counted: they live anyway.  It is what a step takes
operator by operator; a compiler that fuses operators allocates less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx

from rewrite.codegen.workspace import workspace
from rewrite.passes.counting import base, bytes_of, is_view, module_path, sized


def peaks(forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> dict[str, int]:
    """The most bytes that are alive at any operator of each module, '' for those of none.

    `outputs` is the number of results of the step in front of what `forward` keeps for `backward`.  Results are
    alive during the backward: their caller holds them.
    """
    results = _results(forward)
    given, kept = _owners(results[:outputs]), _owners(results[outputs:])
    found: dict[str, int] = defaultdict(int)
    _run(forward.graph, {}, given | kept, found)
    names = {node.name: base(node) for node in results[outputs:] if isinstance(node, fx.Node)}
    alive = {owner: bytes_of(owner) for owner in given | kept if owner.op == "call_function"}
    _run(backward.graph, alive, given | _owners(_results(backward)), found, names)
    return dict(found)


def _run(
    graph: fx.Graph,
    alive: Mapping[fx.Node, int],
    stay: Collection[fx.Node],
    found: dict[str, int],
    names: Mapping[str, fx.Node] | None = None,
) -> None:
    """Play a graph's schedule from what is `alive`; `names` says which storage a placeholder is."""
    nodes, dying = list(graph.nodes), _last_readers(list(graph.nodes), alive, names or {})
    held = dict(alive)
    for owner in dying[-1]:
        if owner not in stay:
            held.pop(owner, None)
    total = sum(held.values())
    for number, node in enumerate(nodes):
        if node.op == "call_function":
            if not is_view(node) and node not in held:
                held[node] = bytes_of(node)
                total += held[node]
            place = module_path(node)
            found[place] = max(found[place], total + _transient(node))
        for owner in dying[number]:
            if owner not in stay:
                total -= held.pop(owner, 0)


def _last_readers(
    nodes: list[fx.Node], alive: Mapping[fx.Node, int], names: Mapping[str, fx.Node]
) -> dict[int, list[fx.Node]]:
    """Storages by the number of the node that reads them last; -1 for those that no node reads."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        owner = base(node)  # of a placeholder itself, which may be a storage of the forward
        owners[node] = names.get(owner.name, owner) if owner.op == "placeholder" else owner
    last = dict.fromkeys(alive, -1)
    for number, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[owners[used]] = number
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for owner, number in last.items():
        found[number].append(owner)
    return found


def _transient(node: fx.Node) -> int:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: sized(n.meta.get("val")))
    return workspace(node.target, *args, **kwargs)


def _results(gm: fx.GraphModule) -> tuple[object, ...]:
    return tuple(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])


def _owners(results: Iterable[object]) -> set[fx.Node]:
    return {base(n) for n in results if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)}
