"""Which output channels of a projection reach a node: a segment of the trace is run again on random numbers.

The derivative of the node by the projection's output is zero, exactly, in the channels that it does not depend on.
So a slice is found however a model writes it: chunks, views per head, strided or interleaved layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from rewrite.structure.flow import Flow, Projection
from rewrite.structure.trace import Value, alias

Tensor = torch.Tensor


def channels(flow: Flow, projection: Projection, target: fx.Node) -> tuple[bool, ...] | None:
    """For every output channel of `projection`, whether `target` depends on it; None where replaying fails."""
    found = slope(flow, projection.out, target)
    return None if found is None else tuple((found.movedim(projection.channel, 0).flatten(1) != 0).any(1).tolist())


def slope(flow: Flow, start: fx.Node, target: fx.Node, lane: int | None = None) -> Tensor | None:
    """The derivative of `target` by `start`, on random numbers; None where replaying fails.

    With `lane`, of the last vector along that dimension of `target` alone.
    """
    after = flow.segment_after(start)
    if target not in after:
        return None
    segment = after & flow.segment_before(target)
    nodes = [n for n in sorted(segment, key=flow.order.__getitem__) if n is not start]
    key = _key(flow, start, nodes, lane)  # one layer is like another
    if key not in flow.slopes:
        flow.slopes[key] = _slope(flow, start, nodes, target, lane)
    return flow.slopes[key]


def _slope(flow: Flow, start: fx.Node, nodes: list[fx.Node], target: fx.Node, lane: int | None) -> Tensor | None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        begin = _random(start.meta["val"]).requires_grad_()
        try:
            end = _run(flow, nodes, {start: begin * 1.0}, target)
            end = end if lane is None else end.movedim(lane, -1).flatten(0, -2)[-1]
            return torch.autograd.grad((end * torch.rand_like(end)).sum(), begin)[0]
        except Exception:  # an operator that cannot run on random numbers
            return None


def _key(flow: Flow, start: fx.Node, nodes: list[fx.Node], lane: int | None) -> str:
    """Equal for segments that compute the same: operators, literals, and shapes of what comes from outside."""
    numbers = {node: number for number, node in enumerate((start, *nodes))}

    def name(node: fx.Node) -> str:
        val = node.meta["val"]
        if node in numbers:
            return f"%{numbers[node]}"
        index = not isinstance(val, Value) or not (val.dtype.is_floating_point or val.dtype.is_complex)
        return f"{val}" + (f"@{flow.order[node]}" if index else "")

    steps = [
        f"{n.target}{map_aggregate((n.args, n.kwargs), lambda a: name(a) if isinstance(a, fx.Node) else a)}"
        for n in nodes
    ]
    return f"{start.meta['val']} {lane} " + " ".join(steps)


def _run(flow: Flow, nodes: Iterable[fx.Node], known: dict[fx.Node, Any], target: fx.Node) -> Tensor:
    def value(node: fx.Node) -> Any:
        if node not in known:
            known[node] = _outside(flow, node)
        return known[node]

    for node in nodes:
        known[node] = value(node.args[0]) if node.target is alias else called(node, value)  # type: ignore[arg-type]
    return known[target]


def called(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a node computes from the values of its inputs, on the CPU."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    kwargs = {k: (torch.device("cpu") if k == "device" else v) for k, v in kwargs.items()}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _outside(flow: Flow, node: fx.Node) -> Any:
    """What stands for a node outside the segment: its value where it is a constant index, else random numbers."""
    val = node.meta["val"]
    if isinstance(val, Value) and val.constant is not None:
        return val.constant
    index = isinstance(val, Value) and not (val.dtype.is_floating_point or val.dtype.is_complex)
    if index and node not in flow.data and node.op == "call_function":
        try:
            return called(node, lambda n: _outside(flow, n))
        except Exception:  # it is computed from what is not known here
            pass
    return tree_map_only(Value, _random, val)


def _random(value: Value) -> Tensor:
    """Positive numbers where a tensor holds numbers (no branch of an activation is dead), zeros for indices."""
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool)
    if value.dtype.is_complex:
        return torch.rand(value.shape, dtype=torch.complex128) + 0.5
    if value.dtype.is_floating_point:
        return torch.rand(value.shape, dtype=torch.float64) + 0.5
    return torch.zeros(value.shape, dtype=value.dtype)
