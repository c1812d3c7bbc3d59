"""encode: on the partitioned graphs, what the forward keeps for the backward is stored by a codec.

Codes and scales take the place of a value among the results of the forward and the inputs of the backward, which
decodes it before its first reader.  The forward computes what it did; the backward computes the same formulas on the
decoded value.  Nothing else is touched: no parameter and nothing made of parameters alone, no result of the model, no
statistic of a reduction, nothing that an exponential reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from rewrite.codegen.codecs import Codec, memory_order
from rewrite.passes.counting import base, bytes_of, hint, is_random, is_view, module_path
from rewrite.passes.keep import Encoded, Placed, block, rules_of
from rewrite.passes.record import Edit, GraphRecord, PassRecord, summarise

aten = torch.ops.aten
_SOURCE = "passes/encode.py"
_EQUATION = "save(x)  ->  save(encode(x)), decode in the backward"
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "adapted_linear_core", "embedding", "attention")
_EXPONENTIALS = {aten.exp.default, aten._log_softmax_backward_data.default, aten.exp2.default}
_PASSED_ON = {aten.sub.Tensor, aten.add.Tensor, aten.mul.Tensor, aten._to_copy.default, aten.detach.default}
_STATISTIC = 4  # times smaller than what it is computed from
_SMALL = 64  # times smaller than the largest value of its block

Decompositions = Mapping[Any, Callable[..., Any]]


def encode(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    outputs: int,
    rules: Sequence[Placed],
    record: GraphRecord,
    parameters: Collection[str],
    decompositions: Decompositions | None = None,
) -> PassRecord:
    """Store what the rules say of the values behind the first `outputs` results of `forward`; both graphs change."""
    done, left = PassRecord("encode"), dict[str, list[fx.Node]]()
    finder = _Finder(forward.graph, backward.graph, outputs, rules, parameters)
    tracer = _Tracer(decompositions or {})
    for node, codec in finder.chosen(left):
        done.edits.append(_edit(node, codec))
        _store(forward.graph, backward.graph, node, finder.inputs[node.name], codec, tracer)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()
    for reason, nodes in left.items():
        count = sum(bytes_of(base(n)) for n in nodes)
        places = summarise(list(dict.fromkeys(module_path(base(n)) for n in nodes)))
        record.note("", f"saved as it is, {count:,} bytes at {places}: {reason}")
    return done


class _Finder:
    """Says which saved values a codec stores, and why others stay as they are."""

    def __init__(
        self,
        forward: fx.Graph,
        backward: fx.Graph,
        outputs: int,
        rules: Sequence[Placed],
        parameters: Collection[str],
    ) -> None:
        results: Any = output_of(forward).args[0]
        self.given = {base(n) for n in results[:outputs] if isinstance(n, fx.Node)}
        tensors = [n for n in results[outputs:] if isinstance(n, fx.Node) and isinstance(n.meta["val"], torch.Tensor)]
        self.inputs = {n.name: n for n in backward.nodes if n.op == "placeholder"}
        # The state of a random generator goes by two names; it is no activation.
        self.saved = [n for n in dict.fromkeys(tensors) if n.name in self.inputs]
        self.whole = next((r for path, r in rules if not path and isinstance(r, Encoded)), None)
        self.activations = _activations(forward, parameters)
        self.largest: dict[str, int] = {}
        for owner in map(base, self.saved):
            if owner not in self.given and owner in self.activations:
                place = block(module_path(owner))
                self.largest[place] = max(self.largest.get(place, 0), bytes_of(owner))

    def chosen(self, left: dict[str, list[fx.Node]]) -> list[tuple[fx.Node, Codec]]:
        """The values to store with their codecs; those that stay as they are go to `left`, by the reason."""
        found, stay = dict[fx.Node, list[tuple[fx.Node, Codec]]](), set[fx.Node]()
        for node in self.saved:
            if not any(rule is not None for rule in self.rules(node)):
                stay.add(base(node))
                continue
            reason = self.refusal(node)
            if reason is None:
                found.setdefault(base(node), []).append((node, self.codec(node)))
                continue
            stay.add(base(node))
            if reason:
                left.setdefault(reason, []).append(node)
        chosen = []
        for owner, views in found.items():
            smaller = sum(_stored_bytes(node, codec) for node, codec in views) < bytes_of(owner)
            if owner not in stay and smaller:
                chosen += views
            else:
                reason = "a part of it is kept as it is" if smaller else "its codes would take no fewer bytes"
                left.setdefault(reason, []).append(owner)
        return chosen

    def rules(self, node: fx.Node) -> list[Encoded | None]:
        """The rule that each reader of a saved value in the backward is subject to."""
        readers = _readers(self.inputs[node.name])
        return [next((r for r in rules_of(n) if isinstance(r, Encoded)), self.whole) for n in readers]

    def codec(self, node: fx.Node) -> Codec:
        rule = self.rules(node)[0]
        assert rule is not None
        return rule.codec

    def refusal(self, node: fx.Node) -> str | None:
        """Why a value that a rule asks for stays as it is; '' where that goes without saying."""
        owner, value = base(node), node.meta["val"]
        if owner.op == "placeholder" or not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            return ""  # parameters and inputs live anyway
        if _numel(owner) <= 1:
            return ""
        if owner in self.given:
            return "it is a result of the model"
        if owner not in self.activations:
            return "it is made of parameters, ids or positions alone"
        if bytes_of(owner) * _SMALL <= self.largest.get(block(module_path(owner)), 0):
            return "it is small"
        if len({rule and rule.codec for rule in self.rules(node)}) > 1:
            return "others read it too"
        if _is_gradient(owner):
            return "it is a gradient"
        if layout(value) is None:
            return "it is a part of another tensor"
        if is_statistic(node, self.activations):
            return "it is a statistic"
        if _exponentiated(self.inputs[node.name]):
            return "the backward takes an exponential of it"
        return None


def _activations(graph: fx.Graph, parameters: Collection[str]) -> set[fx.Node]:
    """The nodes that depend on floating-point inputs or on what was looked up in a table of parameters.

    What depends on parameters alone is no activation, nor what is computed of ids and positions: masks, rotations.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        given = node.op == "placeholder" and node.name not in parameters
        given = given and isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        looked_up = any(word in str(node.target) for word in ("embedding", "index", "gather"))
        if given or looked_up or is_random(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_statistic(node: fx.Node, activations: Collection[fx.Node]) -> bool:
    """Whether a value was reduced from a larger one: a mean, a norm, the logarithm of a sum of exponentials.

    It is small, and what it multiplies would inherit its error.
    """
    stack, seen = [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        source = node
        if node.target is operator.getitem and not is_view(node):
            source, first = node.all_input_nodes[0], node.args[1] == 0
            if first and _is_product(source):
                continue
        elif _is_product(node):
            continue
        inputs = [i for i in source.all_input_nodes if i in activations and _numel(i)]
        if is_view(node):
            stack += inputs
            continue
        if any(_numel(i) >= _STATISTIC * _numel(node) for i in inputs):
            return True
        stack += [i for i in inputs if _numel(i) == _numel(node)]
    return False


def _is_gradient(node: fx.Node) -> bool:
    """Whether an operator computed the gradient of its inputs ahead: an error in it is no error in an activation."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return "linear_cross_entropy" in str(node.target)


def _is_product(node: fx.Node) -> bool:
    """Whether a node contracts, looks up or attends: what comes out is no summary of what goes in."""
    return any(word in str(node.target) for word in _PRODUCTS)


def _numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return torch.Size([hint(s) for s in value.shape]).numel() if isinstance(value, torch.Tensor) else 0


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, itself or through views."""
    for user in node.users:
        if user.op == "call_function" and is_view(user):
            yield from _readers(user)
        elif user.op != "output":
            yield user


def _exponentiated(node: fx.Node) -> bool:
    """Whether an exponential is taken of a value, at once or after a sum or a product with others."""
    stack, seen = list(_readers(node)), set[fx.Node]()
    while stack:
        reader = stack.pop()
        if reader.target in _EXPONENTIALS:
            return True
        if reader not in seen and reader.target in _PASSED_ON:
            stack += _readers(reader)
        seen.add(reader)
    return False


def layout(value: torch.Tensor) -> tuple[int, ...] | None:
    """The order in which the dimensions of a tensor lie in its storage; None where it is not all of it."""
    if hint(value.storage_offset()):
        return None
    return memory_order([hint(s) for s in value.shape], [hint(s) for s in value.stride()])


def _stored_bytes(node: fx.Node, codec: Codec) -> int:
    value = node.meta["val"]
    return codec.bytes(tuple(hint(value.shape[d]) for d in layout(value) or ()), value.dtype)


def _store(
    forward: fx.Graph,
    backward: fx.Graph,
    node: fx.Node,
    read: fx.Node,
    codec: Codec,
    tracer: _Tracer,
) -> None:
    """Let one saved value, `read` in the backward, be stored by a codec."""
    value: torch.Tensor = node.meta["val"]
    order = layout(value)
    assert order is not None
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    encoded = functools.partial(_encoded, codec, order)
    decoded = functools.partial(_decoded, codec, back, value.dtype)
    inherited = {key: kept for key, kept in node.meta.items() if key not in ("val", "tensor_meta")}
    with forward.inserting_before(node.next):
        stored = tracer.inline(forward, encoded, [node], inherited)
    for part, name in zip(stored, ("codes", "scales"), strict=True):
        part._rename(f"{node.name}_{name}")
    _replace_result(output_of(forward), node, stored)
    inputs = []
    for part in stored:
        with backward.inserting_before(read):
            inputs.append(backward.placeholder(part.name))
        inputs[-1].meta = dict(part.meta)
    first = next(n for n in backward.nodes if n in read.users)
    with backward.inserting_before(first):
        (made,) = tracer.inline(backward, decoded, inputs, inherited | {"autograd_backward": True})
    read.replace_all_uses_with(made)
    backward.erase_node(read)


def _replace_result(output: fx.Node, node: fx.Node, stored: Sequence[fx.Node]) -> None:
    """Put the stored tensors in the place of a saved value among the results of a forward."""
    given: Any = output.args[0]
    results, described = list(given), list(output.meta.get("desc", ()))
    at = max(i for i, result in enumerate(results) if result is node)  # a saved one is never a result of the model
    results[at : at + 1] = stored
    output.args = (tuple(results),)
    if described:
        described[at : at + 1] = [described[at]] * len(stored)
        saved = [i for i, d in enumerate(described) if type(d).__name__.startswith("SavedForBackwards")]
        for number, i in enumerate(saved):
            described[i] = dataclasses.replace(described[i], idx=number)
        output.meta["desc"] = described


def _encoded(codec: Codec, order: tuple[int, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return codec.encode(x.permute(order))


def _decoded(codec: Codec, back: tuple[int, ...], dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
    return codec.decode(stored, dtype).permute(back)


class _Tracer:
    """Puts functions into graphs as the operators that they are made of; values that are alike are traced once."""

    def __init__(self, decompositions: Decompositions) -> None:
        self.decompositions, self.traced = dict(decompositions), dict[Any, fx.GraphModule]()

    def trace(self, function: functools.partial[Any], values: Sequence[torch.Tensor]) -> fx.GraphModule:
        alike = [(v.dtype, v.device, str(v.shape), str(v.stride())) for v in values]
        key = (function.func, function.args, *alike)
        if key not in self.traced:
            with torch.no_grad():
                self.traced[key] = make_fx(function, decomposition_table=self.decompositions)(*values)
        return self.traced[key]

    def inline(
        self, graph: fx.Graph, function: functools.partial[Any], inputs: Sequence[fx.Node], meta: Mapping[str, Any]
    ) -> list[fx.Node]:
        """Compute `function` of these inputs at the point of insertion; the nodes of its results come back."""
        values = [n.meta["val"] for n in inputs]
        with detect_fake_mode(values) or contextlib.nullcontext():
            traced = self.trace(function, values)
            known = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
            for node in traced.graph.nodes:
                if node.op == "call_function":
                    known[node] = graph.node_copy(node, known.__getitem__)
                    known[node].meta = {**meta, "val": _fresh(node.meta["val"])}
        return [known[n] for n in output_of(traced.graph).all_input_nodes]


def _fresh(value: Any) -> Any:
    """A fake value of its own for a node: two nodes with one would pass for aliases."""
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


def output_of(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _edit(node: fx.Node, codec: Codec) -> Edit:
    shape = ", ".join(str(hint(s)) for s in node.meta["val"].shape)
    kind = str(node.meta["val"].dtype).removeprefix("torch.")
    before = f"save {node.name}  # {kind}[{shape}], {bytes_of(node):,} bytes"
    after = f"save {codec.name}({node.name})  # {_stored_bytes(node, codec):,} bytes"
    return Edit("encode", module_path(node), _EQUATION, _SOURCE, (before,), (after,))
