"""Our operators in C++ against float64, by every instruction set of this processor; how compiled graphs call them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import rewrite
from rewrite.codegen import branches, columns, direct, dropout, masks, ops, row_norms
from rewrite.codegen.cpu import build, operators
from tests.models import ONE_LAYER, assert_same, batch, disturb, step
from tests.models import build as build_model

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
# rows, columns and rank: around the sizes of blocks (8 rows, 256 columns) and of vectors (4, 8, 16 ranks, and pairs)
SIZES = ((0, 5, 3), (1, 1, 1), (3, 19, 2), (8, 256, 16), (17, 257, 17), (40, 300, 33), (25, 600, 50))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EPS = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8}
"""The unit roundoff."""


@pytest.fixture(params=operators.TARGETS)
def cpu(request: pytest.FixtureRequest) -> Any:
    found = operators.kernels(request.param)
    assert found.library() is not None, found.failure
    return operators.loaded(found)


def assert_sum(found: Tensor, expected: Tensor, size: Tensor, terms: int) -> None:
    """`found` is a sum of that many products whose absolute values add up to `size`, rounded at every step."""
    assert found.shape == expected.shape
    bound = (terms + 3) * EPS[found.dtype] * size
    assert bool(((found.double() - expected).abs() <= bound).all()), float((found.double() - expected).abs().max())


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.double() @ b.double(), a.double().abs() @ b.double().abs()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def laid_out(matrix: Tensor) -> list[Tensor]:
    """The same matrix with rows apart, and column by column."""
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 5), 7.0, dtype=matrix.dtype)
    wide[:, 2:-3] = matrix
    return [matrix, wide[:, 2:-3], matrix.t().contiguous().t()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_low_rank_gradients(cpu, rows, columns, rank, dtype):
    dy, h, B = (numbers(*s, dtype=dtype) for s in ((rows, columns), (rows, rank), (columns, rank)))
    for given, low, factor in zip(laid_out(dy), laid_out(h), laid_out(B), strict=True):
        dh, dB = cpu.low_rank_gradients(given, low, factor, 0.75)
        for found, (expected, size), terms in ((dh, product(dy, B), columns), (dB, product(dy.t(), h), rows)):
            assert_sum(found, 0.75 * expected, size, terms)


def test_leading_dimensions_are_rows(cpu):
    dy, h, B = numbers(2, 3, 40), numbers(2, 3, 5), numbers(40, 5)
    dh, dB = cpu.low_rank_gradients(dy, h, B, 1.0)
    flat = cpu.low_rank_gradients(dy.flatten(0, 1), h.flatten(0, 1), B, 1.0)
    assert dh.shape == h.shape
    torch.testing.assert_close((dh.flatten(0, 1), dB), flat, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (7, 19), (40, 513)])
def test_column_sums(cpu, rows, columns, dtype):
    a, b = numbers(rows, columns, dtype=dtype), numbers(rows, columns, dtype=dtype)
    for x, y in zip(laid_out(a), laid_out(b), strict=True):
        each = a.double() * b.double()
        assert_sum(cpu.column_sums(x, y), each.sum(0), each.abs().sum(0), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (7, 19), (40, 513)])
def test_scaled_sums(cpu, rows, columns, dtype):
    """In one pass, beside the operand and in its place, whatever its strides are."""
    a, b, d = numbers(rows, columns, dtype=dtype), numbers(rows, columns, dtype=dtype), numbers(columns, dtype=dtype)
    each = a.double() * b.double()
    for x, y in zip(laid_out(a.clone()), laid_out(b), strict=True):
        scaled, sums = cpu.scaled_sums(x.copy_(a), y, d)
        assert torch.equal(x, a)
        over = cpu.scaled_sums_(x, y, d)
        for found, total in ((scaled, sums), (x, over)):
            assert torch.equal(found, a * d)
            assert_sum(total, each.sum(0), each.abs().sum(0), rows)


@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_adapted_row_norms(cpu, rows, columns, rank):
    W, A, B = numbers(rows, columns), numbers(rank, columns), numbers(rows, rank)
    expected = (W.double() + 0.75 * B.double() @ A.double()).norm(dim=1)
    for weight, factor in zip(laid_out(W)[:2], laid_out(B), strict=False):
        found = cpu.adapted_row_norms([weight], "dense", A, factor, 0.75)
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-6)


def layer(dtype: torch.dtype, rows: int) -> tuple[Any, ...]:
    """The arguments of a layer with a branch for all outputs and one for a slice of them."""
    x, W, bias = (numbers(*s, dtype=dtype) for s in ((2, rows, 19), (11, 19), (11,)))
    h = [numbers(2, rows, 3, dtype=dtype), numbers(2, rows, 2, dtype=dtype)]
    B = [numbers(11, 3, dtype=dtype), numbers(4, 2, dtype=dtype)]
    return x, [W], "dense", bias, h, B, [0.75, 2.0], [0, 5], []


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_adapted_linear(cpu, rows, dtype, biased, into):
    args = list(layer(dtype, rows))
    args[3] = args[3] if biased else None
    found = cpu.adapted_linear_core(*args)
    if into:
        out = torch.full_like(found, float("nan"))
        assert cpu.adapted_linear_core.out(*args, out=out) is out
        torch.testing.assert_close(out, found, rtol=0, atol=0)
    wide = [t.double() if isinstance(t, Tensor) else [b.double() for b in t] if i in (1, 4, 5) else t
            for i, t in enumerate(args)]  # fmt: skip
    expected = ops._core(*wide)
    size = ops._core(*[t.abs() if isinstance(t, Tensor) else [b.abs() for b in t] if i in (1, 4, 5) else t
                       for i, t in enumerate(wide)])  # fmt: skip
    assert_sum(found, expected, size, 27)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_products(cpu, dtype):
    a, b = ([numbers(*s, dtype=dtype) for s in shapes] for shapes in ([(7, 30), (7, 4)], [(30, 19), (4, 19)]))
    found = cpu.sum_of_products(a, b)
    terms = [product(x, y) for x, y in zip(a, b, strict=True)]
    assert_sum(found, sum(t[0] for t in terms), sum(t[1] for t in terms), 34)  # type: ignore[arg-type]
    out = torch.full_like(found, float("nan"))
    torch.testing.assert_close(cpu.sum_of_products.out(a, b, out=out), found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_dropped_products(cpu, rows, columns, rank, dtype):
    x, A = numbers(rows, columns, dtype=dtype), numbers(rank + 2, columns, dtype=dtype)
    seeds, ranks, p = torch.tensor([2**40 + 1, 77]), [rank, 2], [0.3, 0.05]
    kept = [
        masks.kept(rows, columns, s, pi).double() * masks.scale(pi) for s, pi in zip(seeds.split(1), p, strict=True)
    ]
    dh = numbers(rows, rank + 2, dtype=dtype)
    h = cpu.dropped_linear_core(x, A, seeds, ranks, p)
    dx, dA = cpu.dropped_linear_gradients(dh, x, A, seeds, ranks, p, True)
    none, alone = cpu.dropped_linear_gradients(dh, x, A, seeds, ranks, p, False)
    assert none.numel() == 0
    torch.testing.assert_close(alone, dA, rtol=0, atol=0)
    total = torch.zeros(2, rows, columns, dtype=torch.float64)
    for i, (first, last) in enumerate(((0, rank), (rank, rank + 2))):
        assert_sum(h[:, first:last], *product(x * kept[i], A[first:last].t()), columns)
        assert_sum(dA[first:last], *product(dh[:, first:last].t(), x * kept[i]), rows)
        one = product(dh[:, first:last], A[first:last])
        total += torch.stack([one[0] * kept[i], one[1] * kept[i]])
    assert_sum(dx, total[0], total[1], rank + 4)
    a, b = numbers(rows, 9, dtype=dtype), numbers(9, columns, dtype=dtype)
    both = cpu.sum_of_products([a], [b], dh, A, seeds, ranks, p)
    more = product(a, b)
    assert_sum(both, total[0] + more[0], total[1] + more[1], rank + 15)


def test_every_instruction_set_drops_the_same():
    x, seed = numbers(5, 300), torch.tensor([5])
    found = [operators.loaded(operators.kernels(t)).dropout(x, seed, 0.3) for t in operators.TARGETS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_threads_do_not_change_a_gradient_of_rows(cpu):
    """Only sums over rows are split over threads, and each in a fixed order for a number of threads."""
    dy, h, B = numbers(40, 300), numbers(40, 16), numbers(300, 16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(cpu.low_rank_gradients(dy, h, B, 1.0))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)
    assert_sum(found[0][1], *product(dy.t(), h), 40)


def test_eager_operators_come_here(monkeypatch):
    """With and without the library: the same numbers, and the same operators."""
    dy, h, B, A, W = numbers(9, 30), numbers(9, 4), numbers(30, 4), numbers(4, 20), numbers(30, 20)
    seed = torch.tensor([7, 8])

    def results() -> list[Tensor]:
        return [
            *branches.low_rank_gradients(dy, h, B, 0.5),
            columns.column_sums(dy, dy),
            *columns.scaled_sums(dy, dy, W[:, 0]),
            columns.scaled_sums_(dy.clone(), dy, W[:, 0]),
            branches.sum_of_products([dy], [W]),
            row_norms.adapted_row_norms([W], "dense", A, B, 0.5),
            dropout.dropped(dy, seed[:1], 0.25),
            dropout.linear(W, A, seed, [1, 3], [0.25, 0.5]),
            *dropout.linear_gradients(numbers(30, 4) * 0 + 1, W, A, seed, [1, 3], [0.25, 0.5], True),
        ]

    found = results()
    monkeypatch.setenv(build.SWITCH, "0")
    assert operators.serving(dy, h, B) is None
    torch.testing.assert_close(found, results(), rtol=1e-5, atol=1e-5)


def test_what_is_not_taken():
    x, W = numbers(3, 5), [numbers(4, 5)]
    assert operators.product_unsuitable(x, W, "dense", []) is None
    assert operators.product_unsuitable(x, W, "nf4:float32:64:4x5", []) is None
    assert operators.product_unsuitable(x, W, "int8:4x5", []) == "a weight that is not stored as NF4"
    assert operators.input_gradient_unsuitable("nf4:float32:64:4x5") is None
    assert operators.input_gradient_unsuitable("dense") == "one product of PyTorch"
    assert operators.input_gradient_unsuitable("int8:4x5") == "a weight that is not stored as NF4"
    assert operators.product_unsuitable(x, W, "dense", [1, 2]) == "columns that are left out"
    assert operators.product_unsuitable(x.double(), W, "dense", []) == "a weight of torch.float32 for torch.float64"
    assert operators.serving(torch.empty(2, device="meta")) is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lora(r=3)@linear-head", {"sum_of_products into", "low_rank_gradients in C++"}),
        ("lora(r=3, dropout=0.2)@linear-head", {"dropped_linear_core in C++", "low_rank_gradients in C++"}),
        ("dora(r=3)@linear-head", {"adapted_row_norms in C++", "low_rank_gradients in C++", "scaled_sums_ in C++"}),
        ("lora(r=3)@linear-head + nf4(linear-head)", {"linear_input_gradient into", "low_rank_gradients in C++"}),
    ],
)
def test_compiled_graphs_call_them(spec, expected, monkeypatch):
    """Through Inductor: large results in buffers of the graph, and the numbers of an eager step."""
    called: list[str] = []
    functions = direct.functions
    monkeypatch.setattr(direct, "functions", lambda of_nf4: Recorded(functions(of_nf4), called))
    model = build_model("llama", torch.float32, **ONE_LAYER["llama"])
    model = disturb(rewrite.compile(model, spec, dynamic=False))
    found = []
    for call in (model.forward, model):
        torch.manual_seed(1)
        with torch._inductor.config.patch(fx_graph_cache=False, fallback_random=True):
            found.append(step(model, call, batch("llama"))[1])
    assert_same(*found, 1e-4)  # float32
    assert {"adapted_linear_core into", *expected} <= set(called)


class Recorded(dict):
    """A table of functions that says which were taken from it."""

    def __init__(self, table: dict[str, Any], taken: list[str]) -> None:
        super().__init__(table)
        self.taken = taken

    def __getitem__(self, name: str) -> Any:
        self.taken.append(name)
        return super().__getitem__(name)


def test_without_the_library_a_buffer_is_filled_all_the_same(monkeypatch):
    direct.functions.cache_clear()
    monkeypatch.setenv(build.SWITCH, "0")
    try:
        table = direct.functions()
        assert table["linear_input_gradient"] is ops.routed_input_gradient
        args = layer(torch.float32, 5)
        out = torch.full((2, 5, 11), float("nan"))
        assert table["adapted_linear_core into"](*args, out=out) is out
        torch.testing.assert_close(out, table["adapted_linear_core"](*args), rtol=0, atol=0)
        assert table["low_rank_gradients in C++"] is branches.low_rank_gradients
    finally:
        direct.functions.cache_clear()


def test_autocast_does_not_reach_into_them(cpu):
    W, A, B, x = numbers(30, 20), numbers(4, 20), numbers(30, 4), numbers(7, 20)
    args = x, [W], "dense", None, [numbers(7, 4)], [B], [0.5], [0], []
    calls = (
        lambda: cpu.adapted_row_norms([W], "dense", A, B, 0.5),
        lambda: cpu.adapted_linear_core(*args),
        lambda: cpu.low_rank_gradients(x.double(), numbers(7, 4).double(), A.t().double(), 0.5)[0],
    )
    for call in calls:
        torch.manual_seed(0)
        plain = call()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(), plain, rtol=0, atol=0)
