"""Finds the head of a loss: the product that made the logits, and what happened to them on the way.

From a `cross_entropy` back to its `linear`: elementwise steps (casts, scales, soft caps), which a chunk of rows can do
by itself, and moves of rows (shifts, views, classes in second place), which the head's input can do instead.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rewrite.codegen.rowwise import Chain, Step
from rewrite.passes.builder import example
from rewrite.passes.operators import adapted_linear, linear, mul
from rewrite.passes.pattern import Op
from rewrite.passes.rule import target_name

aten = torch.ops.aten
cross_entropy = Op("cross_entropy", tuple(inspect.signature(F.cross_entropy).parameters), F.cross_entropy)
matmul = Op("matmul", ("input", "other"), operator.matmul, torch.matmul, aten.matmul.default, methods=("matmul",))
div = Op("div", ("input", "other"), operator.truediv, torch.div, torch.true_divide, methods=("div",))
tanh = Op("tanh", ("input",), torch.tanh, F.tanh, methods=("tanh",))
getitem = Op("getitem", ("input", "index"), operator.getitem)
TRANSPOSED = "transposed"  # (d_in, classes): what a product without `linear` multiplies with
_CASTS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
_VIEWS = {"view", "reshape", "flatten", "contiguous", torch.flatten, torch.reshape}
_TURNS = {"transpose", "permute", "movedim", "swapaxes", torch.transpose, torch.permute, torch.movedim}


@dataclass(frozen=True)
class Head:
    """A product, what is done to its result elementwise, and how its rows are moved; `nodes` from loss to product."""

    node: fx.Node
    x: Any
    weight: list[Any]
    layout: str
    bias: Any
    branches: tuple[list[Any], ...]  # h, B, scale, start, as in `adapted_linear`
    chain: Chain
    moves: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


class Unknown(Exception):
    """Why no head was found, for people."""


def find(logits: Any) -> Head:
    """The head behind the first argument of a loss; raises `Unknown` with what stands between."""
    steps: list[Step] = []
    moves: list[fx.Node] = []
    nodes: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node) and node.op != "placeholder":
        nodes.append(node)
        if (found := _product(node)) is not None:
            chain = Chain(tuple(reversed(steps)))
            return Head(node, *found, chain, tuple(reversed(moves)), tuple(nodes))
        if (step := _step(node)) is not None:
            steps.append(step)
        elif _moves(node, last=not moves):
            moves.append(node)
        elif not _same(node):
            raise Unknown(f"its logits come from {_name(node)}")
        node = node.args[1] if mul.arguments(node) and _number(node.args[0]) else node.args[0]
    raise Unknown("its logits are an input of the graph")


def follows(node: fx.Node) -> bool:
    """Whether a node is an elementwise step on logits, or does nothing to them."""
    return _step(node) is not None or _same(node)


def _name(node: fx.Node) -> str:
    return "a constant" if node.op == "get_attr" else target_name(node.target)


def _product(node: fx.Node) -> tuple[Any, list[Any], str, Any, tuple[list[Any], ...]] | None:
    """x, weight, layout, bias and branches of a product with a weight, however it is spelled."""
    if (values := linear.arguments(node)) is not None:
        x, w, b = values
        return (x, [w], "dense", b, ([], [], [], [])) if example(w).ndim == 2 else None
    if (values := adapted_linear.arguments(node)) is not None:
        x, stored, layout, b, *branches, skip = values
        if skip:
            raise Unknown("a part of its weight's columns is multiplied elsewhere")
        return x, list(stored), layout, b, tuple(list(part) for part in branches)
    if (values := matmul.arguments(node)) is not None:
        x, w = values
        return (x, [w], TRANSPOSED, None, ([], [], [], [])) if example(w).ndim == 2 else None
    return None


def _step(node: fx.Node) -> Step | None:
    """The elementwise step that a node is, None where it is another one or does nothing."""
    for op, name in ((mul, "mul"), (div, "div")):
        values = op.arguments(node)
        values = values[::-1] if values is not None and name == "mul" and _number(values[0]) else values
        if values is not None and _number(values[1]) and example(values[0]).dtype == example(node).dtype:
            return Step(name, float(values[1]))
    if tanh.arguments(node) is not None:
        return Step("tanh")
    if not _is_cast(node) or example(node.args[0]).dtype == example(node).dtype:
        return None
    return Step("to", example(node).dtype)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype of a floating-point tensor, or nothing at all."""
    if node.op != "call_method" or node.target not in _CASTS:
        return False
    before, after = example(node.args[0]), example(node)
    return before.is_floating_point() and after.is_floating_point() and before.device == after.device


def _same(node: fx.Node) -> bool:
    """Whether a node is its first argument: a cast to the dtype that it has, a view of the same shape."""
    return _is_cast(node) or (node.target in _VIEWS and _equal(example(node.args[0]).shape, example(node).shape))


def _equal(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes are the same whatever their symbols stand for; asks for no guard."""
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _moves(node: fx.Node, last: bool) -> bool:
    """Whether a node only moves or picks rows, and leaves classes where they are (in second place if it is `last`)."""
    if not node.args or not isinstance(before := example(node.args[0]), torch.Tensor):
        return False
    if node.target in _VIEWS:
        after = example(node)
        return after.ndim == 2 and before.ndim > 2 and statically_known_true(after.shape[1] == before.shape[-1])
    if (values := getitem.arguments(node)) is not None:
        return _picks_rows(values[1], before.ndim)
    return last and node.target in _TURNS and before.ndim == 3 and _turned(node)


def _turned(node: fx.Node) -> bool:
    """(rows, tokens, classes) -> (rows, classes, tokens)"""
    rest = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not all(isinstance(d, int) for d in rest):
        return False
    dims = [d % 3 for d in rest]  # type: ignore[operator]
    return dims == [0, 2, 1] if len(dims) == 3 else sorted(dims) == [1, 2]


def _picks_rows(index: Any, dims: int) -> bool:
    index = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if Ellipsis in [i for i in index if not isinstance(i, fx.Node)]:
        full = index[-1] is Ellipsis or index[-1] == whole
    else:
        full = len(index) < dims or index[-1] == whole
    return full and all(_plain(i) for i in index)


def _plain(index: Any) -> bool:
    """A slice, a number, or a tensor of numbers; a mask would pick a number of rows that nobody knows."""
    if isinstance(index, fx.Node):
        value = example(index)
        return not isinstance(value, torch.Tensor) or value.dtype in (torch.int64, torch.int32)
    return isinstance(index, (slice, int)) or index is Ellipsis


def replay(moves: tuple[fx.Node, ...], x: Any, r: Any) -> Any:
    """The head's input with its rows moved as those of its logits were."""
    for node in moves:
        if node.target in _TURNS:
            continue  # classes in second place: the operator takes rows of classes
        if getitem.arguments(node) is not None:
            x = x[r.proxy(node.args[1])]
        else:
            x = x.reshape(-1, x.shape[-1])
    return x
