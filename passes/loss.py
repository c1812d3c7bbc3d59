"""loss: head -> cross entropy becomes one operator that works in chunks of rows, so that logits are never all kept.

In training graphs alone.  Logits that the model also returns are computed when somebody reads them
(`passes.deferred`).  Where a loss stays as it is, the record says why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rewrite.codegen.cross_entropy import statistics
from rewrite.passes.builder import example
from rewrite.passes.counting import hint
from rewrite.passes.deferred import between, is_random, mark
from rewrite.passes.head import TRANSPOSED, Head, Unknown, cross_entropy, find, follows, replay
from rewrite.passes.pattern import Captures, Pattern
from rewrite.passes.rule import rule, target_name


class Loss(Pattern):
    """A cross entropy, with everything between it and the head that made its logits."""

    def match(self, node: Any, captures: Captures, matched: list[fx.Node], root: bool = False) -> Captures | None:
        if cross_entropy.arguments(node) is None:
            return None
        try:
            matched += reversed(find(node.args[0]).nodes)
        except Unknown:
            pass  # the rule tells why
        matched.append(node)
        return {**captures, "node": node}

    def names(self) -> set[str]:
        return {"node"}

    def __repr__(self) -> str:
        return "cross_entropy(f(linear(x, W, b)), target)"


@rule(Loss())
def chunk_loss(r: Any, node: Any) -> Any:
    """cross_entropy(f(linear(x, W, b)), target)  ->  linear_cross_entropy(x, W, b, target, f), in chunks of rows"""
    if not r.log.training:
        return None
    try:
        head = find(node.node.args[0])
        loss = _arguments(node.node, head)
        _check(head, loss, node.node, r.log.broken)
    except Unknown as reason:
        r.note(f"loss computed from full logits: {reason}")
        return None
    activations = [n for n in (head.x, *head.branches[0])]
    if any(reader.op == "output" for n in head.nodes for reader in _readers(n, head, node.node)):
        mark(head.node, activations)
    return _fused(r, head, loss)


def _arguments(node: fx.Node, head: Head) -> dict[str, Any]:
    """The arguments of a cross entropy by name, with its defaults; raises `Unknown` for what the operator lacks."""
    names = cross_entropy.parameters
    found = dict(zip(names, cross_entropy.arguments(node) or (), strict=True))
    if found["size_average"] is not None or found["reduce"] is not None:
        raise Unknown("it says how to reduce with size_average or reduce")
    target = example(found["target"])
    if target.dtype != torch.int64 or target.ndim != max(example(node.args[0]).ndim - 1, 0):
        raise Unknown("its targets are probabilities")
    if example(node).dtype != head.chain.dtype(example(head.node).dtype):
        raise Unknown("autocast changes the dtype of its logits")
    defaults = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    return found | {name: value for name, value in defaults.items() if found[name] is None}


def _check(head: Head, loss: dict[str, Any], node: fx.Node, broken: bool) -> None:
    """Raises `Unknown` with the reason where a loss should stay as it is."""
    for each in head.nodes:
        for reader in _readers(each, head, node):
            if reader.op != "output":
                raise Unknown(f"{target_name(reader.target)} reads its logits too")
            if not _outermost(node.graph):
                raise Unknown("its logits leave a checkpointed region")
            if broken:
                raise Unknown("a graph break follows, and what comes after it reads its logits")
    rows, classes = _rows_of(example(loss["target"])), int(example(head.node).shape[-1])
    if not rows * classes * statistics(example(head.node).dtype, head.chain).itemsize > _gradients(head, rows):
        raise Unknown(f"{rows} rows of {classes} logits take no more than the gradients that chunks keep instead")
    if loss["reduction"] == "none" and _trained(head):
        raise Unknown('its head trains, and reduction="none" weighs every row by itself')
    cut = (head.x, *head.branches[0])
    if any(is_random(n) for n in between(head.node, cut) if n not in cut):
        raise Unknown("its weights are random")
    if any(isinstance(example(t), torch.Tensor) and example(t).requires_grad for t in [loss["weight"]]):
        raise Unknown("its class weights train")


def _outermost(graph: fx.Graph) -> bool:
    """Whether a graph is the one that Dynamo captured, not one inside it: its inputs come from somewhere."""
    return any(getattr(n, "_dynamo_source", None) is not None for n in graph.nodes if n.op == "placeholder")


def _rows_of(target: torch.Tensor) -> int:
    """How many rows a loss has; in a graph of dynamic sizes, in the call that it was captured from."""
    return math.prod(hint(size) for size in target.shape)


def _gradients(head: Head, rows: int) -> int:
    """Bytes that the operator keeps for the backward: the gradients of the head's input and of what trains in it."""
    width = sum(example(n).shape[-1] for n in (head.x, *head.branches[0]))
    trained = sum(example(n).numel() for n in _trained(head))
    return (rows * width + trained) * example(head.node).dtype.itemsize


def _trained(head: Head) -> list[fx.Node]:
    parameters = [*head.weight, head.bias, *head.branches[1]]
    return [n for n in parameters if isinstance(n, fx.Node) and example(n).requires_grad]


def _readers(node: fx.Node, head: Head, loss: fx.Node) -> list[fx.Node]:
    """Who reads logits besides the loss, seen through casts and scales."""
    found: list[fx.Node] = []
    for user in node.users:
        if user is loss or user in head.nodes:
            continue
        found += _readers(user, head, loss) if follows(user) else [user]
    return found


def _fused(r: Any, head: Head, loss: dict[str, Any]) -> Any:
    """The operator's node, its inputs in the dtype of the product: that of autocast, where there is one."""
    dtype = example(head.node).dtype
    x, weight, bias = r.proxy(head.x), [r.proxy(w) for w in head.weight], r.proxy(head.bias)
    h, B, scale, start = (r.proxy(list(part)) for part in head.branches)
    layout = head.layout
    if layout == TRANSPOSED:
        weight, layout = [weight[0].t()], "dense"
    if layout == "dense":
        weight = [_cast(weight[0], dtype)]
    x = _cast(replay(head.moves, x, r), dtype)
    h = [_cast(replay(head.moves, t, r), dtype) for t in h]
    x, h = (_rows(t) for t in (x,)), [_rows(t) for t in h]
    target = r.proxy(loss["target"])
    found = torch.ops.rewrite.linear_cross_entropy(
        *x, weight, layout, None if bias is None else _cast(bias, dtype), h, [_cast(t, dtype) for t in B],
        list(scale), list(start), target if target.ndim == 1 else target.reshape(-1), r.proxy(loss["weight"]),
        str(head.chain), loss["reduction"], loss["ignore_index"], loss["label_smoothing"],
    )  # fmt: skip
    return found.reshape(target.shape) if loss["reduction"] == "none" and target.ndim != 1 else found


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t if t.dtype == dtype else t.to(dtype)


def _rows(t: Any) -> Any:
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


LOSS = (chunk_loss,)
