"""Columns and output rows of a matrix: products, gradients, and what is kept for them."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite.codegen.forms import IN, OUT, TOKENS, Columns, OutputRows, Places, Run
from rewrite.codegen.maps import Convolution, Lookup, Rows

OUTER, INNER = 7, 5


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


WHERE = {
    "first": lambda n: Run(0, 2, n),
    "inside": lambda n: Run(1, 4, n),
    "last": lambda n: Run(n - 1, n, n),
    "all": lambda n: Run(0, n, n),
    "places": lambda n: Places(torch.tensor([3, 0, 4], dtype=torch.int32), n),
    "one place": lambda n: Places(torch.tensor([2], dtype=torch.int32), n),
}


def count(where) -> int:
    return len(where.at) if isinstance(where, Places) else where.stop - where.start


def indices(where) -> list[int]:
    return where.at.tolist() if isinstance(where, Places) else list(range(where.start, where.stop))


def columns(where) -> Columns:
    at = where(INNER)
    return Columns(matrix(OUTER, count(at)), at)


def rows(where) -> OutputRows:
    at = where(OUTER)
    return OutputRows(matrix(count(at), INNER), at)


every_form = pytest.mark.parametrize("form", [columns, rows])
everywhere = pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)


@everywhere
def test_values_stand_at_their_positions(where):
    for form, dim in ((columns(where), 1), (rows(where), 0)):
        dense, at = form.materialise(), indices(form.at)
        assert torch.equal(dense.index_select(dim, torch.tensor(at)), form.values)
        rest = [i for i in range(dense.shape[dim]) if i not in at]
        assert not dense.index_select(dim, torch.tensor(rest, dtype=torch.int64)).any()


@every_form
@everywhere
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (1, 1)], ids=str)
def test_factored_equals_materialised_with_gradients(form, where, lead):
    M, x, g = form(where), matrix(*lead, INNER).requires_grad_(), matrix(*lead, OUTER)
    M.values.requires_grad_()
    dense = M.materialise()
    found = torch.autograd.grad(M.apply(x, scale=0.25), (x, M.values), g)
    wanted = torch.autograd.grad(x @ dense.T * 0.25, (x, M.values), g, retain_graph=True)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    close(M.apply(x), x @ dense.T)
    close(M.T.materialise(), dense.T)
    close(M.T.apply(g), g @ dense)
    close(M.squares(), dense.square().sum(-1))


@every_form
@everywhere
def test_a_gate_is_the_factor_of_a_row(form, where):
    M, x, gate = form(where), matrix(2, 3, INNER), torch.tensor([0.5, -2.0], dtype=torch.float64).view(2, 1, 1)
    close(M.gated(gate).apply(x), gate * M.apply(x))
    one = torch.tensor([3.0], dtype=torch.float64)
    close(M.gated(one).gated(one).materialise(), 9 * M.materialise())


@every_form
@everywhere
def test_through_an_embedding_and_a_convolution_and_at_rows(form, where):
    M, at = form(where), Rows(7, 1, 2, 3)
    dense, ids, x = M.materialise(), torch.randint(0, INNER, (2, 3)), matrix(4, INNER)
    close(M.apply(ids, Lookup(), like=x), dense.T[ids])
    wave = matrix(2, 1, 9)
    close(M.apply(wave, Convolution((INNER,))), F.conv1d(wave, dense[:, None]))
    close(M.spread(at).apply(x), at.put(M.apply(x), -1))
    close(M.add_to(dense.new_zeros(21, INNER), rows=at), at.put(dense))


@everywhere
@pytest.mark.parametrize("tokens", [1, 6])
def test_columns_keep_a_copy_of_their_inputs_and_nothing_else(where, tokens):
    M, x = columns(where), matrix(tokens, INNER).requires_grad_()
    M.values.requires_grad_()
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        M.apply(x)
    own = {M.values.untyped_storage().data_ptr()}
    own |= {M.at.at.untyped_storage().data_ptr()} if isinstance(M.at, Places) else set()
    saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    assert saved == tokens * count(M.at) * 8


@every_form
def test_costs(form):
    M = form(WHERE["inside"])
    assert sympy.simplify(M.cost() - TOKENS * 3 * (OUT if isinstance(M, Columns) else IN)) == 0
    assert M.is_light()


@pytest.mark.parametrize("bounds", [(-1, 2), (2, 2), (3, 2), (0, 6)])
def test_a_run_outside_of_the_matrix_is_refused(bounds):
    with pytest.raises(ValueError, match="no part of 5"):
        Run(*bounds, 5)
