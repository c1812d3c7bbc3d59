"""pin_static: on the joint graph, what depends on parameters alone is recomputed in the backward, never saved.

Without it the min-cut partitioner saves every dequantised or cast weight of a frozen base, because it bans
recomputing what a backward product reads.  Of what depends on *trained* parameters, only data movement (casts,
views, concatenations) and sums are pinned: they are cheap, where a norm of a weight may not be.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rewrite.passes.counting import is_random, is_view, module_path
from rewrite.passes.record import Edit, PassRecord

aten = torch.ops.aten
_CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
_MOVES = _CASTS | {aten.cat.default, aten.clone.default, aten.contiguous.default, aten.add.Tensor}
NO_REGION = 1 << 30
"""The number of the region that what is pinned belongs to: later than any."""
_SOURCE = "passes/pin_static.py"
_EQUATION = "save(f(frozen weights))  ->  recompute f(frozen weights) in the backward"


def pin_static(graph: fx.Graph, frozen: Collection[fx.Node], trained: Collection[fx.Node]) -> PassRecord:
    """Tag MUST_RECOMPUTE on everything that depends only on the frozen (and cheaply on the trained) inputs."""
    fixed, moved, pinned = set(frozen), set(frozen) | set(trained), []
    for node in graph.nodes:
        needs = node.all_input_nodes  # none at all: a constant, such as the entries of a code book
        if node.op == "get_attr":
            fixed.add(node)
            moved.add(node)
        if node.op != "call_function" or is_random(node):
            continue
        if fixed.issuperset(needs):
            fixed.add(node)
        elif not (moved.issuperset(needs) and (node.target in _MOVES or is_view(node))):
            continue
        moved.add(node)
        pinned.append(node)
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        # The partitioner reads tags only where a region id stands beside them, and saves what a later region reads.
        node.meta["ac_graph_id"] = NO_REGION
    # One record per value that something else reads; what it is made of goes without saying.
    edges = [n for n in pinned if n.all_input_nodes and any(user not in moved for user in n.users)]
    return PassRecord("pin_static", [_edit(node) for node in edges])


def _edit(node: fx.Node) -> Edit:
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    text = f"{node.name} = {str(node.target).removeprefix('aten.').removesuffix('.default')}  # {shape}"
    before, after = (f"save {text}",), (f"recompute {text}",)
    return Edit("pin_static", module_path(node), _EQUATION, _SOURCE, before, after)
