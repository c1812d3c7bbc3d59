"""Sparse products on a GPU against dense ones in float64."""

import pytest
import torch

from rewrite.codegen.forms import scattered
from rewrite.codegen.kernels import sparse

OUTER, INNER, COUNT, EACH = 37, 91, 301, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def entries(kind, dtype, index, device):
    """(values, rows or None, columns): distinct places, some twice, all in one column, or as many in every row."""
    if kind == "in every row":
        columns = torch.stack([torch.randperm(INNER)[:EACH] for _ in range(OUTER)]).flatten()
        rows = None
    else:
        rows, columns = scattered(COUNT, OUTER, INNER, 3)
        if kind == "twice":
            rows[COUNT // 2 :], columns[COUNT // 2 :] = (
                rows[: -(-COUNT // 2)].clone(),
                columns[: -(-COUNT // 2)].clone(),
            )
        if kind == "in one column":
            columns[:] = INNER - 1
        rows = rows.to(device, index)
    return torch.randn(columns.shape[0]).to(device, dtype), rows, columns.to(device, index)


def dense(values, rows, columns):
    """The matrix in float64."""
    rows = torch.arange(OUTER, device=values.device).repeat_interleave(EACH) if rows is None else rows
    at = rows.long() * INNER + columns.long()
    return (
        torch.zeros(OUTER * INNER, dtype=torch.float64, device=values.device)
        .index_add(0, at, values.double())
        .view(OUTER, INNER)
    )


def close(found, exact, terms, dtype):
    """Within one rounding to `dtype`, and the float32 sum of `terms`, the magnitudes that were added."""
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6 * terms + torch.finfo(dtype).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["distinct", "twice", "in one column", "in every row"])
@pytest.mark.parametrize("tokens", [(1,), (5,), (2, 67), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_and_gradients(kind, tokens, dtype, device):
    index = torch.int64 if dtype is torch.float16 else torch.int32
    x, dy = torch.randn(*tokens, INNER).to(device, dtype), torch.randn(*tokens, OUTER).to(device, dtype)
    values, rows, columns = entries(kind, dtype, index, device)
    assert sparse.supports(x, values, rows, columns, OUTER) is None
    S, exact, dexact = dense(values, rows, columns), x.double(), dy.double()
    size = dense(values.abs(), rows, columns)
    y = sparse.product(x, values, rows, columns, OUTER)
    assert y.shape == dy.shape
    close(y, exact @ S.T, exact.abs() @ size.T, dtype)
    dx, dvalues = sparse.gradients(dy, x, values, rows, columns)
    assert dx.shape == x.shape
    close(dx, dexact @ S, dexact.abs() @ size, dtype)
    of_entry = torch.arange(OUTER, device=device).repeat_interleave(EACH) if rows is None else rows.long()
    both = dexact.reshape(-1, OUTER)[:, of_entry], exact.reshape(-1, INNER)[:, columns.long()]
    close(dvalues, (both[0] * both[1]).sum(0), (both[0] * both[1]).abs().sum(0), dtype)


def test_activations_that_are_not_contiguous(device):
    values, rows, columns = entries("distinct", torch.float32, torch.int32, device)
    wide = torch.randn(9, 2 * INNER, device=device)
    for x in (
        wide[:, :INNER],
        wide[:, ::2],
        wide.t()[:INNER].t(),
        torch.randn(INNER, 4, 3, device=device).permute(2, 1, 0),
    ):
        y = sparse.product(x, values, rows, columns, OUTER)
        assert y.is_contiguous()
        assert torch.equal(y, sparse.product(x.contiguous(), values, rows, columns, OUTER))


def test_values_and_coordinates_that_are_not_contiguous(device):
    values, rows, columns = entries("distinct", torch.float32, torch.int32, device)
    x, at = torch.randn(4, INNER, device=device), torch.stack([rows, columns], dim=1)
    apart = torch.stack([values, values], dim=1)[:, 0]
    found = sparse.product(x, apart, at[:, 0], at[:, 1], OUTER)
    assert torch.equal(found, sparse.product(x, values, rows, columns, OUTER))
    found = sparse.gradients(found, x, apart, at[:, 0], at[:, 1])
    expected = sparse.gradients(sparse.product(x, values, rows, columns, OUTER), x, values, rows, columns)
    assert all(map(torch.equal, found, expected))


def test_no_entries(device):
    x, none = torch.randn(4, INNER, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    values = torch.zeros(0, device=device)
    assert torch.equal(sparse.product(x, values, none, none, OUTER), x.new_zeros(4, OUTER))
    dx, dvalues = sparse.gradients(x.new_ones(4, OUTER), x, values, none, none)
    assert torch.equal(dx, torch.zeros_like(x))
    assert dvalues.shape == (0,)


def test_parameters_of_another_dtype(device):
    values, rows, columns = entries("distinct", torch.float32, torch.int32, device)
    x = torch.randn(4, INNER, device=device).bfloat16()
    exact, S = x.double(), dense(values, rows, columns)
    close(sparse.product(x, values, rows, columns, OUTER), exact @ S.T, exact.abs() @ S.abs().T, torch.bfloat16)
    _, dvalues = sparse.gradients(x.new_ones(4, OUTER), x, values, rows, columns)
    assert dvalues.dtype == torch.float32


def test_what_has_no_kernel(device):
    x, values = torch.randn(4, INNER, device=device), torch.randn(3, device=device)
    at = torch.zeros(3, dtype=torch.int32, device=device)
    assert sparse.supports(x.double(), values, at, at, OUTER) == "no kernel for torch.float64"
    assert sparse.supports(x, values, at.short(), at.short(), OUTER) == "no kernel for torch.int16"
    assert sparse.supports(x, values, at, at.long(), OUTER) == "rows are torch.int32, columns torch.int64"


@pytest.mark.gpu
@pytest.mark.parametrize("each", [0, 2])
def test_operator_at_the_sizes_of_a_model(each):
    """Gradients through the operator, the same bits twice; more tokens than a slab has."""
    tokens, outer, inner, count = 2500, 4096, 1024, 2 * 4096
    x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    values = torch.randn(count, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    at = scattered(count, outer, inner, 0).to("cuda", torch.int32)
    rows = None if each else at[0]
    dy = torch.randn(tokens, outer, device="cuda", dtype=torch.bfloat16)

    def step():
        y = torch.ops.rewrite.sparse_product(x, values, rows, at[1], outer)
        return y, *torch.autograd.grad(y, (x, values), dy)

    (y, dx, dvalues), again = step(), step()
    assert all(map(torch.equal, (y, dx, dvalues), again))
    of_entry = torch.arange(outer, device="cuda").repeat_interleave(2) if each else at[0].long()
    S = torch.zeros(outer, inner, dtype=torch.float64, device="cuda")
    S.index_put_((of_entry, at[1].long()), values.detach().double(), accumulate=True)
    exact, dexact = x.detach().double(), dy.double()
    close(y, exact @ S.T, exact.abs() @ S.abs().T, torch.bfloat16)
    close(dx, dexact @ S, dexact.abs() @ S.abs(), torch.bfloat16)
    both = dexact[:, of_entry] * exact[:, at[1].long()]
    close(dvalues, both.sum(0), both.abs().sum(0), torch.bfloat16)


@pytest.mark.gpu
def test_a_replayed_graph_sees_coordinates_that_moved():
    x, dy = torch.randn(70, INNER, device="cuda"), torch.randn(70, OUTER, device="cuda")
    values, rows, columns = entries("distinct", torch.float32, torch.int32, torch.device("cuda"))
    torch.ops.rewrite.sparse_product(x, values, rows, columns, OUTER)  # compiles
    torch.ops.rewrite.sparse_product_backward(dy, x, values, rows, columns)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.rewrite.sparse_product(x, values, rows, columns, OUTER)
        dx, dvalues = torch.ops.rewrite.sparse_product_backward(dy, x, values, rows, columns)
    for _ in range(2):
        rows.copy_(rows.flip(0))
        columns.copy_(columns.roll(7))
        graph.replay()
        assert torch.equal(y, torch.ops.rewrite.sparse_product(x, values, rows, columns, OUTER))
        again = torch.ops.rewrite.sparse_product_backward(dy, x, values, rows, columns)
        assert torch.equal(dx, again[0])
        assert torch.equal(dvalues, again[1])
