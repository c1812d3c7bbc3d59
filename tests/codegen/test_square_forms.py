"""Rotations and reflections as forms: block-diagonal, butterfly and Householder matrices, and where they come from."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from rewrite.codegen.forms import (
    IN,
    OUT,
    TOKENS,
    Base,
    BlockDiagonal,
    Butterfly,
    Dense,
    Form,
    Householder,
    cayley,
    cayley_neumann,
    skew,
)
from rewrite.codegen.maps import Convolution, Lookup, Rows


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


SQUARE = {
    "blocks": lambda: BlockDiagonal(matrix(3, 5, 5)),
    "one block, repeated": lambda: BlockDiagonal(matrix(1, 3, 3), 7),
    "blocks of one": lambda: BlockDiagonal(matrix(4, 1, 1)),
    "butterfly of one factor": lambda: Butterfly(matrix(1, 3, 5, 5)),
    "butterfly": lambda: Butterfly(matrix(3, 4, 6, 6)),
    "butterfly reversed": lambda: Butterfly(matrix(2, 6, 2, 2), True),
    "reflections": lambda: Householder.reflections(matrix(7, 3)),
}
every_form = pytest.mark.parametrize("form", SQUARE.values(), ids=SQUARE)


@every_form
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_factored_equals_materialised(form, lead):
    M = form()
    dense = M.materialise()
    n = dense.shape[-1]
    assert dense.shape == (n, n)
    x = matrix(*lead, n)
    assert Form.has_factors(M, Lookup()) is False
    close(M.apply(x), x @ dense.T)
    close(M.apply(x, scale=0.25), x @ dense.T * 0.25)
    close(M.T.apply(x), x @ dense)
    close(M.T.materialise(), dense.T)
    close(M.T.T.materialise(), dense)
    close(M.row_norms(), dense.norm(dim=-1))


@every_form
def test_products_with_a_weight_form_nothing_twice(form):
    M = form()
    n = M.materialise().shape[-1]
    W, V, x = matrix(11, n), matrix(n, 11), matrix(4, n)
    close((Base(W) @ M).materialise(), W @ M.materialise())
    close((M @ Base(V)).materialise(), M.materialise() @ V)
    close((Base(W) @ M).apply(x), x @ (W @ M.materialise()).T)
    rows = Rows(1, 2, 2 + n, n + 5)
    close(M.spread(rows).apply(x), rows.put(M.apply(x), -1))


@every_form
def test_through_an_embedding_and_a_convolution(form):
    M = form()
    n = M.materialise().shape[-1]
    ids = torch.randint(0, n, (2, 3))
    close(M.apply(ids, Lookup(), like=matrix(1)), M.materialise().T[ids])
    x = matrix(2, 1, n + 2)
    close(M.apply(x, Convolution((n,))), torch.nn.functional.conv1d(x, M.materialise()[:, None]))


STACKED = {
    "blocks": (lambda: BlockDiagonal(matrix(2, 3, 5, 5)), 15),
    "one block, repeated": (lambda: BlockDiagonal(matrix(2, 1, 5, 5), 3), 15),
    "butterfly": (lambda: Butterfly(matrix(2, 2, 4, 2, 2)), 8),
    "reflections": (lambda: Householder.reflections(matrix(2, 7, 4)), 7),
}


@pytest.mark.parametrize(("form", "n"), STACKED.values(), ids=STACKED)
def test_a_stack_is_each_on_its_own(form, n):
    M = form()
    dense, W = M.materialise(), matrix(2, 9, n)
    assert dense.shape == (2, n, n)
    tensors = [getattr(M, name) for name in ("blocks", "V", "P") if hasattr(M, name)]
    rest = [M.count] if isinstance(M, BlockDiagonal) else []
    for number in range(2):
        close(dense[number], type(M)(*(t[number] for t in tensors), *rest).materialise())
    close((Base(W) @ M).materialise(), W @ dense)


def test_blocks_stand_on_the_diagonal():
    blocks = matrix(3, 5, 5)
    close(BlockDiagonal(blocks).materialise(), torch.block_diag(*blocks))


def test_a_butterfly_is_the_product_of_its_permuted_factors():
    """Against permutations written as matrices, index by index, as the paper has them."""
    factors, count, size = 3, 8, 6
    n, half, blocks = count * size, size // 2, matrix(factors, count, size, size)
    dense = torch.eye(n, dtype=torch.float64)
    for i in range(factors):
        group, order = size * 2**i, []
        for start in range(0, n, group):
            halves = [list(range(start + half * h, start + half * (h + 1))) for h in range(group // half)]
            order += [index for part in halves[0::2] + halves[1::2] for index in part]
        P = torch.eye(n, dtype=torch.float64)[order]
        dense = dense @ P @ torch.block_diag(*blocks[i]) @ P.T
    close(Butterfly(blocks).materialise(), dense, 1e-10)


def test_reflections_are_their_chain():
    U = matrix(7, 5)
    chain = torch.eye(7, dtype=torch.float64)
    for u in U.unbind(-1):
        chain = chain @ (torch.eye(7, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    close(Householder.reflections(U).materialise(), chain)


def test_equal_reflections_cancel():
    U = matrix(9, 4).repeat_interleave(2, dim=-1)
    close(Householder.reflections(U).materialise(), torch.eye(9, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_skew_and_cayley(n):
    entries = 0.3 * matrix(2, n * (n - 1) // 2)
    Q = skew(entries, n)
    rows, columns = torch.triu_indices(n, n, 1)
    assert torch.equal(Q[:, rows, columns], entries)
    assert torch.equal(Q, -Q.mT)
    R, one = cayley(Q), torch.eye(n, dtype=torch.float64)
    close(R @ R.mT, one.expand(2, n, n))
    close(R @ (one + Q), one - Q)


def test_the_series_nears_the_transposed_transform():
    Q = 0.01 * skew(matrix(1, 6), 4)
    exact = cayley(Q).mT
    errors = [float((cayley_neumann(Q, terms) - exact).abs().max()) for terms in (2, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 < errors[0]
    assert torch.equal(cayley_neumann(Q, 3), cayley_neumann(Q, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: BlockDiagonal(cayley(skew(t.view(2, 3), 3))),
        lambda t: BlockDiagonal(cayley_neumann(skew(t.view(2, 3), 3), 5)),
        lambda t: Householder.reflections(t.view(6, 1)),
    ],
    ids=["cayley", "series", "reflections"],
)
def test_gradients(make):
    x, t = matrix(2, 6).requires_grad_(), matrix(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: make(t).apply(x), (x, t))


def test_costs():
    assert sympy.simplify(BlockDiagonal(matrix(3, 5, 5)).cost() - TOKENS * IN * 5) == 0
    assert sympy.simplify(Butterfly(matrix(2, 4, 6, 6)).cost() - TOKENS * IN * 12) == 0
    assert sympy.simplify(Householder.reflections(matrix(7, 3)).cost() - TOKENS * IN * 6) == 0
    for form in SQUARE.values():
        sizes = {TOKENS: 1000, IN: 10**6, OUT: 10**6}
        assert form().cost().subs(sizes) < Dense(matrix(2, 2)).cost().subs(sizes)


@every_form
def test_casting_keeps_the_structure(form):
    M = form()
    x = torch.randn(3, M.materialise().shape[-1], dtype=torch.bfloat16)
    assert M.apply(x).dtype == torch.bfloat16
    assert M.map(lambda t: t.to(torch.float32)).materialise().dtype == torch.float32
