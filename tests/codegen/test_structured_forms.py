"""Structured matrices: factors, dense matrix, transpose and gradients agree, at sizes that divide nothing."""

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
    Circulant,
    Dense,
    Diagonal,
    Form,
    Formed,
    Hadamard,
    Kronecker,
    LowRank,
    LowRankBlocks,
    Tiled,
)
from rewrite.codegen.maps import LINEAR, Convolution, Lookup, Matmul, Rows


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def low_rank(rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(matrix(rows, rank), matrix(rank, columns))


FORMS = {
    "hadamard": lambda: Hadamard(low_rank(21, 15, 3), low_rank(21, 15, 2)),
    "hadamard with cores": lambda: Hadamard(
        LowRank(matrix(21, 3), matrix(3, 15), matrix(3)), LowRank(matrix(21, 2), matrix(2, 15), matrix(2, 2))
    ),
    "hadamard of a weight": lambda: Hadamard(Base(matrix(21, 15)), low_rank(21, 15, 3)),
    "kronecker": lambda: Kronecker(matrix(3, 5), Dense(matrix(7, 3))),
    "kronecker, low rank": lambda: Kronecker(matrix(7, 3), low_rank(3, 5, 2)),
    "kronecker with a row": lambda: Kronecker(matrix(1, 1), Dense(matrix(21, 15))),
    "kronecker of three": lambda: Kronecker(matrix(7, 1), Kronecker(matrix(1, 5), Dense(matrix(3, 3)))),
    "blocks": lambda: LowRankBlocks(matrix(21, 6), matrix(6, 15), 3),
    "blocks of unequal size": lambda: LowRankBlocks(matrix(21, 6), matrix(6, 15), 2),
    "more blocks than rows": lambda: LowRankBlocks(matrix(21, 23), matrix(23, 15), 23),
    "one block": lambda: LowRankBlocks(matrix(21, 4), matrix(4, 15), 1),
    "tiles": lambda: Tiled(matrix(21, 5), 15),
    "tiles, the last one cut": lambda: Tiled(matrix(21, 4), 15),
    "less than one tile": lambda: Tiled(matrix(21, 64), 15),
    "circulant": lambda: Circulant(matrix(7, 5, 3)),
    "circulant, a number a block": lambda: Circulant(matrix(21, 15, 1)),
}
FACTORED = {name: make for name, make in FORMS.items() if make().has_factors(LINEAR)}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def tensors(form: Form) -> list[Tensor]:
    found: list[Tensor] = []
    form.map(lambda t: found.append(t) or t)
    return found


def test_all_but_the_product_with_a_weight_have_factors():
    assert set(FORMS) - set(FACTORED) == {"hadamard of a weight"}


@every_form
@pytest.mark.parametrize("shape", [(4, 15), (2, 3, 15), (0, 15), (1, 1, 15), (15,)])
def test_factored_equals_materialised(make, shape):
    form, x = make(), matrix(*shape)
    expected = x @ form.materialise().t()
    close(form.apply(x), expected)
    close(form.apply(x, scale=0.25), expected * 0.25)
    close(Formed(form).apply(x), expected)


@every_form
def test_its_transpose(make):
    form, x = make(), matrix(4, 21)
    assert form.materialise().shape == (21, 15)
    assert torch.equal(form.T.T.materialise(), form.materialise())
    close(form.T.materialise(), form.materialise().t())
    close(form.T.apply(x), x @ form.materialise())


@pytest.mark.parametrize("make", FACTORED.values(), ids=FACTORED)
def test_gradients_through_the_factors(make):
    form, x = make(), matrix(4, 15).requires_grad_()
    leaves = [x, *(t.requires_grad_() for t in tensors(form))]
    seed = matrix(4, 21)
    found = torch.autograd.grad(form.apply(x), leaves, seed)
    expected = torch.autograd.grad(x @ form.materialise().t(), leaves, seed)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        close(one, other)


STACKED = {name: make for name, make in FORMS.items() if name != "hadamard with cores"}  # a core is (r,) or (r, r)


@pytest.mark.parametrize("make", STACKED.values(), ids=STACKED)
def test_a_stack(make):
    one, other = make(), make()
    fields = iter(torch.stack(pair) for pair in zip(tensors(one), tensors(other), strict=True))
    stack = one.map(lambda _: next(fields))
    close(stack.materialise(), torch.stack([one.materialise(), other.materialise()]))
    close(stack.T.materialise(), stack.materialise().transpose(-2, -1))


@every_form
def test_through_other_layers(make):
    form = make()
    dense, ids, x = form.materialise(), torch.randint(0, 15, (2, 3)), matrix(2, 5, 9)
    close(form.apply(ids, Lookup(), like=dense), dense.t()[ids])
    layer = Convolution((3,), padding=(1,))
    close(form.apply(x, layer), torch.nn.functional.conv1d(x, dense.unflatten(1, (5, 3)), padding=1))
    close(form.apply(matrix(4, 15).fill_(1.0), Matmul(True)), dense.sum(-1).expand(4, -1))


@every_form
def test_at_some_rows(make):
    form, rows, x = make(), Rows(3, 1, 8, 9), matrix(4, 15)
    close(form.spread(rows).apply(x), rows.put(form.apply(x), -1))
    close(form.spread(rows).materialise(), rows.put(form.materialise()))


@every_form
def test_parameters_are_cast_to_the_activation(make):
    form, x = make().map(lambda t: t.to(torch.float32)), matrix(4, 15).to(torch.bfloat16)
    y = form.apply(x)
    assert y.dtype == torch.bfloat16
    exact = x.double() @ form.materialise().double().t()
    assert (y.double() - exact).norm() < 0.03 * exact.norm()


@every_form
def test_in_a_composition(make):
    form, x = make(), matrix(4, 15)
    d, W = matrix(21), matrix(21, 15)
    whole = Diagonal(d) @ (Base(W) + form * 0.5)
    expected = d[:, None] * (W + 0.5 * form.materialise())
    close(whole.materialise(), expected)
    close(whole.apply(x), x @ expected.t())
    close(whole.row_norms(), expected.norm(dim=-1))


def test_against_other_ways_to_write_them():
    L, M, w = matrix(3, 5), matrix(7, 3), matrix(2, 3, 4)
    close(Kronecker(L, Dense(M)).materialise(), torch.kron(L, M))
    shifted = torch.stack([w.roll(k, -1) for k in range(4)], dim=2)  # (block row, block column, row, column)
    close(Circulant(w).materialise(), shifted.transpose(1, 2).reshape(8, 12))
    K = matrix(5, 4)
    close(Tiled(K, 11).materialise(), K.repeat(1, 3)[:, :11])
    B, A = matrix(6, 4), matrix(4, 10)
    blocks = LowRankBlocks(B, A, 2).materialise()
    for i in range(2):
        for j in range(2):
            block = B[3 * i : 3 * i + 3, 2 * j : 2 * j + 2] @ A[2 * i : 2 * i + 2, 5 * j : 5 * j + 5]
            close(blocks[3 * i : 3 * i + 3, 5 * j : 5 * j + 5], block)


def test_an_elementwise_product_of_low_ranks_is_one():
    form = Hadamard(low_rank(21, 15, 3), low_rank(21, 15, 2))
    assert form.rank == 6
    assert torch.linalg.matrix_rank(form.materialise()) == 6
    close(form.product().materialise(), form.materialise())


SIZES = {TOKENS: 2048, IN: 4096, OUT: 11008}


def cost(form: Form) -> sympy.Expr:
    return form.cost().subs(SIZES)


def test_costs_count_multiply_adds():
    meta = torch.device("meta")
    lora = LowRank(torch.empty(11008, 64, device=meta), torch.empty(64, 4096, device=meta))
    pair = [LowRank(torch.empty(11008, 8, device=meta), torch.empty(8, 4096, device=meta))] * 2
    assert cost(Hadamard(*pair)) == cost(lora) + 64 * (4096 + 11008)
    assert Hadamard(*pair).formation().subs(SIZES) == (8 + 8 + 1) * 4096 * 11008
    assert cost(LowRankBlocks(lora.B, lora.A, 4)) == cost(lora)
    assert LowRankBlocks(lora.B, lora.A, 4).formation().subs(SIZES) == 16 * 4096 * 11008
    # 64 rows of x through (172, 64), then (172, 64) through (64, 64)
    whole = Kronecker(torch.empty(64, 64, device=meta), Dense(torch.empty(172, 64, device=meta)))
    assert cost(whole) == 2048 * (64 * 64 * 172 + 172 * 64 * 64)
    thin = LowRank(torch.empty(172, 8, device=meta), torch.empty(8, 64, device=meta))
    assert cost(Kronecker(whole.L, thin)) == 2048 * (64 * 8 * (64 + 172) + 172 * 64 * 64)
    assert Kronecker(whole.L, thin).formation().subs(SIZES) == 8 * 64 * 172 + 4096 * 11008
    assert cost(Tiled(lora.B, 4096)) == 2048 * (4096 + 64 * 11008)


def test_circulants_are_worth_their_transforms_in_large_blocks_alone():
    dense = Formed(Circulant(matrix(3, 4, 1)))
    assert cost(Circulant(matrix(3, 4, 1))) > cost(dense)
    assert 20 * cost(Circulant(matrix(3, 4, 256))) < cost(dense)
