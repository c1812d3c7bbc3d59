"""coarse: nonlinearities that a rule is about store their derivative in a few bits.

A nonlinearity whose value the backward reads anyway, because a product with another activation follows (a gate), is
left: its input would be kept beside the code, and nothing saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._C import _nn  # type: ignore[attr-defined]  # where Dynamo finds F.gelu

from rewrite.codegen.activations import NONLINEARITIES
from rewrite.passes.keep import Coarse, rules_of
from rewrite.passes.operators import mul
from rewrite.passes.record import Edit, GraphRecord, PassRecord, summarise

_SOURCE = "passes/coarse.py"
_EQUATION = "f(x), save(x)  ->  f(x), save(f'(x)) in a few bits"
_FUNCTIONS: dict[Any, str] = {
    **{F.silu: "silu", F.gelu: "gelu", _nn.gelu: "gelu", F.mish: "mish", F.hardswish: "hardswish"},
    **{F.softplus: "softplus", _nn.softplus: "softplus", F.elu: "elu", F.tanh: "tanh", torch.tanh: "tanh"},
    **{F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"},
    F.leaky_relu: "leaky_relu",
}
_METHODS = {"tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu"}
Known = tuple[str, float]
"""(name in `NONLINEARITIES`, parameter) of a nonlinearity."""


def coarse(graphs: Sequence[fx.Graph], record: GraphRecord) -> PassRecord:
    """Let the nonlinearities that the rules of a record are about store their derivative, in place."""
    done, left = PassRecord("coarse"), defaultdict[str, list[str]](list)
    whole = next((r for path, r in record.rules if not path and isinstance(r, Coarse)), None)
    for graph in graphs:
        for node in list(graph.nodes):
            rule = next((r for r in rules_of(node) if isinstance(r, Coarse)), whole)
            known = of_node(node)
            value = node.meta.get("example_value")
            if rule is None or known is None or not isinstance(value, torch.Tensor) or not value.ndim:
                continue
            bits = NONLINEARITIES[known[0]].bits(rule.bits, rule.approximate)
            site = str(node.meta.get("site", ""))
            if bits is None:
                why = "no derivative of one bit" if rule.approximate else "more than two slopes, '~' approximates them"
                left[f"{known[0]} has {why}"].append(site)
            elif any(_gates(user, node) for user in node.users):
                left["it multiplies another activation, its value is kept anyway"].append(site)
            else:
                _replace(graph, node, known, bits)
                done.edits.append(_edit(node, known[0], bits, site))
    for reason, sites in left.items():
        record.note("", f"derivatives as they are at {summarise(list(dict.fromkeys(sites)))}: {reason}")
    return done


def of_call(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Known | None:
    """The nonlinearity that a call computes, None where it is none that is known, or has other parameters."""
    name = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    given = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
    rest = list(args[1:])
    if name is None or kwargs.get("inplace") or (args and "input" in kwargs):
        return None
    if name == "gelu" and not rest:
        kind = given.pop("approximate", "none")
        name = "gelu_tanh" if kind == "tanh" else "gelu"
    parameter = 0.0
    if name == "leaky_relu":
        parameter = float(rest.pop(0) if rest else given.pop("negative_slope", 0.01))
        rest = [value for value in rest if value is not False]
    if name in ("silu", "mish", "hardswish", "relu", "relu6") and rest == [False]:
        rest = []  # not in place
    return None if rest or given else (name, parameter)


def of_node(node: fx.Node) -> Known | None:
    """The nonlinearity that a node of a captured graph computes."""
    if node.op not in ("call_function", "call_method"):
        return None
    return of_call(node.target, node.args, dict(node.kwargs))


def _gates(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user multiplies a value by another tensor."""
    return any(isinstance(side, fx.Node) and side is not node for side in mul.arguments(user) or ())


def _replace(graph: fx.Graph, node: fx.Node, known: Known, bits: int) -> None:
    x: Any = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.rewrite.coarse_activation.default, (x, known[0], bits, known[1]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _edit(node: fx.Node, name: str, bits: int, site: str) -> Edit:
    kept = f"its derivative in {bits} bit{'' if bits == 1 else 's'}"
    before, after = f"{node.name} = {name}(x)  # saves x", f"{node.name} = {name}(x)  # saves {kept}"
    return Edit("coarse", site, _EQUATION, _SOURCE, (before,), (after,))
