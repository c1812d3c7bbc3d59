"""Structured updates: factored and materialised agree, for every form and their algebra."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from rewrite.codegen.delta import IN, OUT, TOKENS, Delta, LowRank, Scaled, Shift

OUTER, INNER, RANK = 7, 5, 3


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def low_rank(rank: int = RANK) -> LowRank:
    return LowRank(matrix(OUTER, rank), matrix(rank, INNER))


FORMS = {
    "low rank": low_rank,
    "scaled": lambda: low_rank() * 0.7,
    "scaled twice": lambda: 2.0 * (low_rank() * -0.7),
    "sum": lambda: low_rank() + low_rank(2),
    "difference": lambda: low_rank() - low_rank(2),
    "with a shift": lambda: (low_rank() + Shift(matrix(OUTER))) * 1.5,
    "sum of scaled": lambda: low_rank() * 0.5 + low_rank(1) * 3.0 + Shift(matrix(OUTER)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(4, INNER), (2, 3, INNER), (0, INNER), (1, 1, INNER), (INNER,)])
def test_factored_equals_materialised(form, shape):
    delta, x = form(), matrix(*shape)
    dense = x @ (delta.materialise() + torch.zeros(OUTER, INNER, dtype=torch.float64)).t()
    shift = delta.shift()
    expected = dense if shift is None else dense + shift
    torch.testing.assert_close(delta.apply(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(delta.apply(x, 0.25), expected * 0.25, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_terms_add_up(form):
    delta, x = form(), matrix(4, INNER)
    total = sum((term.apply(x) for term in delta.terms()), torch.zeros(4, OUTER, dtype=torch.float64))
    torch.testing.assert_close(total, delta.apply(x), rtol=1e-12, atol=1e-12)


def test_low_ranks_add_to_one_branch():
    assert isinstance(low_rank() - low_rank(2), LowRank)
    assert len(((low_rank() - low_rank(2)) * 2.0).terms()) == 1


def test_a_difference_of_equals_is_nothing():
    form = low_rank()
    x = matrix(4, INNER)
    assert (form - form).apply(x).abs().max() < 1e-14


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_map_reaches_every_tensor(form):
    delta = form()
    seen: list[Tensor] = []
    mapped = delta.map(lambda t: seen.append(t) or t.to(torch.float32))
    assert seen
    assert mapped.materialise().dtype == torch.float32


def test_parameters_are_cast_to_the_activation():
    form = LowRank(torch.randn(OUTER, RANK), torch.randn(RANK, INNER)) + Shift(torch.randn(OUTER))
    assert form.apply(torch.randn(4, INNER, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_cost_counts_multiply_adds():
    cost = (low_rank() + Shift(matrix(OUTER))).cost()
    assert sympy.simplify(cost - TOKENS * RANK * (IN + OUT)) == 0


def test_the_base_class_states_nothing():
    for call in (lambda d: d.apply(matrix(1, 1)), lambda d: d.materialise(), lambda d: d.cost(), lambda d: d.map(id)):
        with pytest.raises(NotImplementedError):
            call(Delta())
    assert Delta().shift() is None
    assert Scaled(Delta(), 2.0).shift() is None
