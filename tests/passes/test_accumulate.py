"""accumulate: the gradient of an input that layers share is one sum of products, equal to eager's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import rewrite
from rewrite.passes.accumulate import accumulate
from rewrite.passes.record import GraphRecord
from rewrite.runtime.captures import records_of

OPS = torch.ops.rewrite
aten = torch.ops.aten
IDS = torch.arange(5)[None]


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 10)
        self.one, self.two, self.three = nn.Linear(10, 12), nn.Linear(10, 8), nn.Linear(10, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x.sum() + (self.one(x) * self.three(x)).sum() + self.two(x).square().sum()


def trained(spec: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model, its gradients in eager and compiled."""
    model = rewrite.attach(Siblings().double(), spec)
    for p in model.parameters():
        p.data.normal_()
    model(IDS).backward()
    eager = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = torch.compile(model, backend="rewrite", dynamic=False, options={"backend": "aot_eager"})
    step(IDS).backward()
    return model, eager, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def edits(record: GraphRecord) -> list[list[int]]:
    """The contractions of every sum, from its record."""
    (done,) = [p for p in record.passes if p.name == "accumulate"]
    return [[int(line.split(", ")[1].split(")")[0]) for line in edit.removed] for edit in done.edits]


def test_layers_and_adapters_that_share_an_input():
    model, eager, compiled = trained("lora(r=3)@linear + full(embed)")
    assert sorted(eager) == sorted(compiled)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-12, atol=1e-12)
    (record,) = records_of(model)
    assert edits(record) == [[12, 12, 9, 8]]  # three layers, and one product of three adapters


def traced(function, *inputs: Tensor) -> fx.GraphModule:
    """A graph as a joint one: the first input is the gradient of a result."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(function)(*inputs)
    first = next(iter(gm.graph.nodes))
    first.target = "tangents_1"
    return gm


def targets(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def check(function, *inputs: Tensor) -> tuple[fx.GraphModule, int]:
    """The graph after the pass and the number of its edits; it computes the same."""
    gm = traced(function, *inputs)
    record = accumulate(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for ours, theirs in zip(gm(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return gm, len(record.edits)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_what_is_no_product_is_added_to_the_sum():
    def function(dy, W, dh, A, rest):
        return ((dy @ W + rest.sin()) + (dh @ A + rest),)

    gm, count = check(function, leaf(2, 3, 7), leaf(7, 5), leaf(2, 3, 2), leaf(2, 5), leaf(2, 3, 5))
    assert count == 1
    found = targets(gm)
    assert found.count(OPS.sum_of_products.default) == 1
    assert aten.mm.default not in found


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda dy, W, dh, A: (dy @ W + dh,), "one product"),
        (lambda dy, W, dh, A: (dy @ W + 2.0,), "a number"),
        (lambda dy, W, dh, A: ((a := dy @ W) + (b := dh[:, :7] @ W), a * b), "products that others read"),
        (lambda dy, W, dh, A: (torch.add(dy @ W, dh[:, :7] @ W, alpha=2),), "a scaled addition"),
        (lambda dy, W, dh, A: (dy.sum() * (dh @ A + dh @ A.sin()).exp(),), "products of the forward"),
        (lambda dy, W, dh, A: (dy @ W + (dy @ W)[:1],), "an addition that broadcasts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sums_that_stay(function, why):
    gm, count = check(function, leaf(3, 7), leaf(7, 8), leaf(3, 8), leaf(8, 8))
    assert count == 0
    assert OPS.sum_of_products.default not in targets(gm)


def test_a_sum_that_others_read_is_one_of_its_own():
    def function(dy, W, A):
        inner = dy @ W + dy.sin() @ W
        return inner + dy.cos() @ A, inner

    gm, count = check(function, leaf(3, 7), leaf(7, 5), leaf(7, 5))
    assert count == 1
    assert targets(gm).count(OPS.sum_of_products.default) == 1


def test_a_gradient_behind_dropout_is_added_in_place():
    seed = torch.tensor([3, 4])

    def function(dy, W, dh, x, A):
        dx, dA = OPS.dropped_linear_gradients(dh, x, A, seed, [2, 1], [0.5, 0.25], True)
        return dy @ W + dx, dA

    gm, count = check(function, leaf(2, 3, 7), leaf(7, 5), leaf(2, 3, 3), leaf(2, 3, 5), leaf(3, 5))
    assert count == 1
    (node,) = [n for n in gm.graph.nodes if n.target is OPS.dropped_linear_gradients.default]
    assert node.args[-1] is False
    assert aten.add.Tensor not in targets(gm)


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_the_operator(rows):
    a, b = [leaf(rows, 7), leaf(rows, 2), leaf(3, rows).t()], [leaf(7, 5), leaf(5, 2).t(), leaf(3, 5)]
    expected = sum(x @ w for x, w in zip(a, b, strict=True))
    torch.testing.assert_close(OPS.sum_of_products(a, b), expected, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(OPS.sum_of_products.default, (a, b), test_utils=("test_schema", "test_faketensor"))
    dh, A, seed, rest = leaf(rows, 3), leaf(3, 5), torch.tensor([3, 4]), ([2, 1], [0.5, 0.25])
    dx, _ = OPS.dropped_linear_gradients(dh, leaf(rows, 5), A, seed, *rest, True)
    found = OPS.sum_of_products(a, b, dh, A, seed, *rest)
    torch.testing.assert_close(found, expected + dx, rtol=1e-12, atol=1e-12)
