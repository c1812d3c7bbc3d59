"""What a trace says about the repeated blocks of a model: what comes out of them, who reads it, how they attend.

A side network is built of these facts: nothing here looks at a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewrite.structure.attention import Attention
from rewrite.structure.flow import Flow
from rewrite.structure.operators import ACTIVATION, CONTRACTION, name_of
from rewrite.structure.replay import called
from rewrite.structure.trace import Value, alias

MASKED = -1e4
"""A score at or below this is of a key that is not attended to."""


@dataclass(frozen=True)
class Called:
    """The calls of an element of a list of modules: how many, the shape of what comes out first, the innermost module
    that it comes from, and the modules that are called with just that."""

    count: int
    shape: tuple[int, ...]
    maker: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """How an attention module attends: the width of a head, whether keys come from another sequence, and whether a
    token sees those after it (`causal` None: the mask could not be read)."""

    width: int
    cross: bool
    causal: bool | None


def calls(flow: Flow) -> dict[str, Called]:
    """The calls of every element of a list of modules, by path."""
    readers: dict[fx.Node, list[str]] = {}
    for call in flow.trace.calls:
        if call.inputs:
            readers.setdefault(flow.strip(call.inputs[0]), []).append(call.path)
    made, found = makers(flow), dict[str, Called]()
    for call in flow.trace.calls:
        if not call.path.rpartition(".")[2].isdigit() or not call.outputs:
            continue
        before = found.get(call.path)
        last = flow.strip(call.outputs[0])
        shape = tuple(call.outputs[0].meta["val"].shape)
        found[call.path] = Called(1 + (before.count if before else 0), shape, made[last], tuple(readers.get(last, ())))
    return found


def makers(flow: Flow) -> dict[fx.Node, str]:
    """The innermost module whose call put out a node, or a value that the node is a mere view of."""
    found: dict[fx.Node, str] = {}
    for call in flow.trace.calls:  # inner calls end first
        for node in call.outputs:
            found.setdefault(flow.strip(node), call.path)
    return found


def activation(flow: Flow, x: fx.Node) -> str:
    """The activation function in front of the last projection of a feed-forward network, by its name in torch."""
    seen = {name_of(n).rstrip("_"): n for n in flow.segment_before(x) if name_of(n) in ACTIVATION}
    if "gelu" in seen:
        return "gelu_tanh" if seen["gelu"].kwargs.get("approximate") == "tanh" else "gelu"
    known = {"erf": "gelu", "tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "sigmoid": "silu"}
    return next((known[name] for name in known if name in seen), "silu")


def causal(flow: Flow, attention: Attention) -> bool | None:
    """Whether a token sees those after it: from the operator, or from its mask, which is computed again."""
    if attention.causal:
        return True
    if attention.bias is None:
        return False
    try:
        mask = _value(flow, attention.bias, {})
    except Exception:  # it depends on what is not known here
        return None
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False  # one token, or keys of another sequence
    hidden = ~mask if mask.dtype == torch.bool else mask <= MASKED
    later = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    return bool(hidden.reshape(-1, *mask.shape[-2:])[0][later].all())


def _value(flow: Flow, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node for a batch without padding; activations and weights count as nothing."""
    if node in known:
        return known[node]
    val = node.meta["val"]
    if isinstance(val, Value) and val.constant is not None:
        found: Any = val.constant
    elif node in flow.projections or node in flow.weights or (name_of(node) in CONTRACTION and node in flow.mixers):
        found = torch.zeros(val.shape, dtype=val.dtype)
    elif node.op == "placeholder":
        if not (node.meta.get("input") or node.meta.get("names")):
            raise ValueError("a buffer has no values here")
        weight = bool(node.meta.get("names")) or val.dtype.is_floating_point
        found = torch.zeros(val.shape, dtype=val.dtype) if weight else torch.ones(val.shape, dtype=val.dtype)
    elif node.target is alias:
        found = _value(flow, node.args[1], known)  # type: ignore[arg-type]
    else:
        found = called(node, lambda n: _value(flow, n, known))
    known[node] = found
    return found
