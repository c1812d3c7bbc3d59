"""Codebooks, pairs and fast transforms as forms, at sizes that are no powers of two, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rewrite.codegen.forms import IN, OUT, TOKENS, Base, Codebook, Cosine, Dense, Form, LowRank, Pairs, Walsh
from rewrite.codegen.maps import LINEAR, Convolution, Lookup, Rows


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FORMS = {
    **{f"cosine of {n}": lambda n=n: Cosine(n, matrix(1)) for n in (1, 2, 3, 7, 12)},
    "inverse cosine": lambda: Cosine(9, matrix(1), True),
    **{f"walsh {rows} x {columns}": lambda s=(rows, columns): Walsh(*s, matrix(1)) for rows, columns in
       ((1, 1), (8, 8), (5, 5), (5, 8), (16, 3), (3, 11))},
    "pairs": lambda: Pairs(matrix(12), matrix(12), 4, 12),
    "pairs of neighbours": lambda: Pairs(matrix(6), matrix(6), 2, 6),
    "pairs of an odd number": lambda: Pairs(matrix(8), matrix(8), 8, 7),
    "one channel": lambda: Pairs(matrix(2), matrix(2), 2, 1),
}  # fmt: skip
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_factored_equals_materialised(make, lead):
    M = make()
    dense = M.materialise()
    rows, columns = dense.shape
    assert M.has_factors(LINEAR)
    x, y = matrix(*lead, columns), matrix(*lead, rows)
    close(M.apply(x), x @ dense.T)
    close(M.apply(x, scale=0.25), x @ dense.T * 0.25)
    close(M.T.apply(y), y @ dense)
    close(M.T.materialise(), dense.T)
    close(M.T.T.materialise(), dense)


@every_form
def test_products_with_a_weight(make):
    M = make()
    dense = M.materialise()
    rows, columns = dense.shape
    W, V, x = matrix(11, rows), matrix(columns, 11), matrix(4, columns)
    close((Base(W) @ M).materialise(), W @ dense)
    close((M @ Base(V)).materialise(), dense @ V)
    close((Base(W) @ M).apply(x), x @ (W @ dense).T)
    at = Rows(1, 2, 2 + rows, rows + 5)
    close(M.spread(at).apply(x), at.put(M.apply(x), -1))


@every_form
def test_through_other_layers(make):
    M = make()
    dense = M.materialise()
    ids, x = torch.randint(0, dense.shape[1], (2, 3)), matrix(2, 1, dense.shape[1] + 2)
    close(M.apply(ids, Lookup(), like=dense), dense.T[ids])
    close(M.apply(x, Convolution((dense.shape[1],))), torch.nn.functional.conv1d(x, dense[:, None]))


@every_form
def test_gradients(make):
    M, leaves = make(), []
    trained = M.map(lambda t: leaves.append(t.requires_grad_()) or t)
    x = matrix(3, M.materialise().shape[1]).requires_grad_()
    assert torch.autograd.gradcheck(trained.apply, x)
    if isinstance(M, Pairs):
        assert torch.autograd.gradcheck(lambda own, other: Pairs(own, other, M.group, M.n).apply(x), tuple(leaves))


@every_form
def test_half_precision(make):
    M = make()
    exact = M.materialise()
    x = matrix(5, exact.shape[1]).to(torch.bfloat16)
    y = M.apply(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - x.double() @ exact.T).norm() <= 0.02 * (x.double() @ exact.T).norm()
    assert M.map(lambda t: t.to(torch.float32)).materialise().dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_cosines_are_those_of_the_definition(n):
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    expected = torch.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    expected[0] /= math.sqrt(2)
    C = Cosine(n, matrix(1))
    close(C.materialise(), expected)
    close((C.T @ C).materialise(), torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (16, 16), (5, 8), (8, 5), (6, 11), (5, 5)])
def test_walsh_is_the_leading_part_of_sylvesters_matrix(rows, columns):
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < max(rows, columns):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / math.sqrt(2)
    M = Walsh(rows, columns, matrix(1)).materialise()
    close(M, H[:rows, :columns])
    if columns == len(H):
        close(M @ M.T, torch.eye(rows, dtype=torch.float64))


def test_pairs_are_rotated_index_by_index():
    own, other, x = matrix(12), matrix(12), matrix(12)
    expected = torch.empty_like(x)
    for start in (0, 6):
        for i, j in ((start + k, start + 3 + k) for k in range(3)):
            expected[i] = own[i] * x[i] - other[i] * x[j]
            expected[j] = own[j] * x[j] + other[j] * x[i]
    close(Pairs(own, other, 6, 12).apply(x), expected)


def test_pairs_that_rotate_keep_the_length():
    angle = matrix(3).repeat_interleave(2)
    R = Pairs(angle.cos(), angle.sin(), 2, 6).materialise()
    close(R @ R.T, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("width", [12, 11, 9])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_a_codebook_mixes_the_best_of_its_bank(width, k):
    logits, bank = matrix(2, 5, 3, 7), matrix(7, 4)
    expected = torch.zeros(2, 5, 12, dtype=torch.float64)
    for place in ((s, r, t) for s in range(2) for r in range(5) for t in range(3)):
        best = sorted(range(7), key=lambda i, row=logits[place]: -float(row[i]))[:k]
        total = sum(math.exp(logits[place][i]) for i in best)
        stack, row, tile = place
        expected[stack, row, 4 * tile : 4 * tile + 4] = sum(math.exp(logits[place][i]) / total * bank[i] for i in best)
    form = Codebook(logits, bank, k, width)
    close(form.materialise(), expected[..., :width])
    close(form.T.materialise(), expected[..., :width].mT)
    close(Codebook(logits[0], bank, k, width).apply(x := matrix(4, width)), x @ expected[0, :, :width].T)


def test_factors_of_codebooks_train_logits_and_bank():
    tensors = tuple(t.requires_grad_() for t in (matrix(2, 3, 5), matrix(2, 4, 5), matrix(5, 3)))

    def update(over: Tensor, under: Tensor, bank: Tensor) -> Tensor:
        left, right = Codebook(over, bank, 2, 8).T, Codebook(under, bank, 2, 12)
        return LowRank(left.materialise(), right.materialise()).materialise()

    assert update(*tensors).shape == (8, 12)
    assert torch.autograd.gradcheck(update, tensors)


def test_costs():
    sizes = {TOKENS: 1000, IN: 1024, OUT: 1024}
    dense = Dense(matrix(1, 1)).cost().subs(sizes)
    vectors = matrix(1024)
    fast: list[Form] = [Cosine(1024, matrix(1)), Walsh(1024, 1024, matrix(1)), Pairs(vectors, vectors, 64, 1024)]
    assert all(20 * form.cost().subs(sizes) < dense for form in fast)
    assert all(form.formation().subs(sizes) <= 1024**2 * 15 for form in fast)
    assert Codebook(matrix(1024, 4, 9), matrix(9, 256), 2, 1024).cost().subs(sizes) == dense + 2 * 1024**2


@pytest.mark.parametrize(("d_out", "d_in"), [(8, 8), (5, 3), (3, 130)])
def test_walsh_is_an_operator_that_is_its_own_gradient(d_out, d_in):
    x = matrix(2, d_in).requires_grad_()
    torch.library.opcheck(torch.ops.rewrite.walsh.default, (x, d_out))
    torch.autograd.gradcheck(lambda t: torch.ops.rewrite.walsh(t, d_out), x)
    torch.autograd.gradgradcheck(lambda t: torch.ops.rewrite.walsh(t, d_out), x)
