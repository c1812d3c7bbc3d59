"""columns: the gradient of a scale of every output is one operator, equal to what it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import rewrite
from rewrite.codegen import lowering
from rewrite.passes.columns import columns
from rewrite.runtime.captures import records_of
from tests.models import assert_same, batch, build, disturb, step

aten = torch.ops.aten


def traced(function, *inputs: Tensor, symbolic: bool = False) -> fx.GraphModule:
    """A graph as a joint one: the first input is the gradient of a result."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(function, tracing_mode="symbolic" if symbolic else "real")(*inputs)
    next(node for node in gm.graph.nodes if node.op == "placeholder").target = "tangents_1"
    for node in gm.graph.nodes:
        node.meta.setdefault("val", node.meta.get("tensor_meta"))
    return gm


def sums(gm: fx.GraphModule) -> int:
    return sum(n.target is torch.ops.rewrite.column_sums.default for n in gm.graph.nodes)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 1), (0, 4)])
@pytest.mark.parametrize("keep", [False, True])
def test_a_sum_over_rows_of_a_product(shape, keep):
    dy, y = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    rows = list(range(len(shape) - 1))
    gm = traced(lambda g, x: (aten.sum.dim_IntList(g * x, rows, keep),), dy, y, symbolic=True)
    record = columns(gm.graph)
    assert sums(gm) == len(record.edits) == 1
    gm.recompile()
    (found,) = gm(dy, y)
    torch.testing.assert_close(found, (dy * y).sum(rows, keep), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: ((g * x).sum(1),),  # along rows
        lambda g, x: ((g * x).sum(),),
        lambda g, x: ((g * x[:1]).sum(0),),  # broadcast
        lambda g, x: ((g.float() * x).sum(0),),  # of two dtypes
        lambda g, x: ((x * x).sum(0), g),  # of the forward
        lambda g, x: (aten.sum.dim_IntList(g * x, [0], dtype=torch.float32),),
        lambda g, x: (g.sum(0), x),
    ],
)
def test_what_stays(function):
    gm = traced(function, torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64), symbolic=True)
    assert not columns(gm.graph).edits
    assert not sums(gm)


def targets(gm: fx.GraphModule) -> list[str]:
    return [n.target.__name__.removesuffix(".default") for n in gm.graph.nodes if "rewrite" in str(n.target)]


@pytest.mark.parametrize("swapped", [False, True])
def test_what_scales_the_same_gradient_is_computed_with_the_sum(swapped):
    """Whichever comes first, of two or three dimensions."""

    def function(g: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        if swapped:
            total = (x * g).sum((0, 1))
            return d * g, total + 1
        scaled = (g * d).sin()
        return scaled, (g * x).sum((0, 1))

    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (2, 3, 5), (5,))]
    gm = traced(function, *inputs, symbolic=True)
    (edit,) = columns(gm.graph).edits
    assert targets(gm) == ["scaled_sums"]
    assert "scaled_sums(a, b, d)" in edit.equation
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x, d: (g * d, (g * x).sum(0), g + 1),  # something else reads it
        lambda g, x, d: ((g * d).sin(), (g * (g * d)).sum(0)),  # the sum is of the scaled one
        lambda g, x, d: (g * d[:1], (g * x).sum(0)),  # no scale of columns
        lambda g, x, d: (g * d[None], (g * x).sum(0)),
    ],
)
def test_a_gradient_that_is_scaled_apart(function):
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((6, 5), (6, 5), (5,))]
    gm = traced(function, *inputs, symbolic=True)
    columns(gm.graph)
    assert targets(gm) == ["column_sums"]
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=1e-14, atol=1e-14)


CALLED = torch.ops.rewrite.scaled_sums
PLACED = {
    "its last use": (lambda g, x, d: CALLED(g.sin(), x, d), True),
    "a view of a product": (lambda g, x, d: CALLED((g @ x.t() @ x).view(2, 3, 40), x.view(2, 3, 40), d), True),
    "an input": (lambda g, x, d: CALLED(g, x, d), False),
    "a view of an input": (lambda g, x, d: CALLED(g.view(3, 2, 40), x.view(3, 2, 40), d), False),
    "a result": (lambda g, x, d: (h := g.sin(), *CALLED(h, x, d)), False),
    "read later": (lambda g, x, d: ((h := g @ x.t() @ x), *CALLED(h, x, d), h.t() @ h)[1:], False),
    "a view read later": (lambda g, x, d: ((h := g @ x.t() @ x).t(), *CALLED(h, x, d), h.t() @ x)[1:], False),
    "read before": (lambda g, x, d: CALLED(h := g.sin(), x @ (h.t() @ x), d), True),
}


@pytest.mark.parametrize("case", PLACED)
def test_what_else_reads_a_gradient_or_its_memory(case):
    function, over = PLACED[case]
    inputs = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    gm = traced(function, *inputs, symbolic=True)
    (node,) = (n for n in gm.graph.nodes if n.target is CALLED.default)
    assert lowering.is_last_use(node.args[0], node) == over


@pytest.mark.parametrize("case", ["a view of a product", "read later"])
def test_a_gradient_is_scaled_in_place_where_nothing_else_reads_it(case):
    from torch._inductor.utils import run_and_get_code

    lowering.install()
    function, over = PLACED[case]
    inputs = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    found, (source,) = run_and_get_code(torch.compile(function, dynamic=False), *(t.clone() for t in inputs))
    torch.testing.assert_close(found, function(*inputs))
    assert ("['scaled_sums_ in C++']" in source) == over
    assert ("['scaled_sums in C++']" in source) != over


def test_a_quotient_that_scales_rows_is_computed_once():
    def function(x: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return x * (m / n), m / (n + 1), (x / x) * x  # the second scales nothing, the third is no vector

    inputs = [torch.rand(s, dtype=torch.float64) + 0.5 for s in ((7, 5), (5,), (5,))]
    gm = traced(function, *inputs, symbolic=True)
    columns(gm.graph)
    assert targets(gm) == ["quotient"]
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=0, atol=0)


def test_inductor_divides_once_for_all_rows():
    from torch._inductor.utils import run_and_get_code

    def scaled(x: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return (x * torch.ops.rewrite.quotient(m, n)).sin()

    lowering.install()
    x, m, n = torch.randn(6, 40), torch.randn(40), torch.rand(40) + 1
    found, (source,) = run_and_get_code(torch.compile(scaled, dynamic=False), x, m, n)
    torch.testing.assert_close(found, scaled(x, m, n))
    divided, stored, used = source.index(" / "), source.index(".store(out_ptr0"), source.index(".sin()")
    assert divided < stored < used


@pytest.mark.parametrize("spec", ["dora(r=3)@linear", "ia3@ffn.up"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_equals_eagers(spec, dynamic):
    model = disturb(rewrite.compile(build("llama"), spec, backend="aot_eager", dynamic=dynamic))
    assert_same(step(model, model, batch("llama"))[1], step(model, model.forward, batch("llama"))[1])
    found = [p for record in records_of(model) for p in record.passes if p.name == "columns"]
    assert sum(len(p.edits) for p in found)
