"""recompute: on the joint graph, what lies inside the regions of a rule is computed again in the backward.

Regions of different blocks have different numbers, so that the value at the border of two of them is saved.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rewrite.passes.counting import module_path
from rewrite.passes.keep import Recomputed, block, rules_of
from rewrite.passes.pin_static import NO_REGION
from rewrite.passes.record import Edit, PassRecord

_SOURCE = "passes/recompute.py"
_EQUATION = "save(f(x))  ->  compute f(x) again in the backward"


def recompute(graph: fx.Graph) -> PassRecord:
    """Tag MUST_RECOMPUTE on the forward nodes of all regions; the partitioner replays the state of random ones."""
    numbers = {int(n.meta["ac_graph_id"]) for n in graph.nodes if "ac_graph_id" in n.meta}
    first = 1 + max(numbers - {NO_REGION}, default=0)
    regions: dict[tuple[Recomputed, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        rule = next((r for r in rules_of(node) if isinstance(r, Recomputed)), None)
        if rule is None or node.op != "call_function" or _in_backward(node) or "recompute" in node.meta:
            continue
        regions[rule, block(module_path(node))].append(node)
    for number, nodes in enumerate(regions.values(), first):
        for node in nodes:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = number
    return PassRecord("recompute", [_edit(rule, nodes) for (rule, _), nodes in regions.items()])


def _in_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _edit(rule: Recomputed, nodes: list[fx.Node]) -> Edit:
    place = _common([module_path(n) for n in nodes])
    count = f"{len(nodes)} operators"
    before, after = f"save what the backward reads of {count}", f"recompute {count}  # {rule.label}"
    return Edit("recompute", place, _EQUATION, _SOURCE, (before,), (after,))


def _common(paths: list[str]) -> str:
    """The module that all these paths are in."""
    parts = [path.split(".") for path in paths if path]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
