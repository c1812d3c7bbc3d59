"""Structured updates: factored and materialised agree, for every form and their algebra."""

from __future__ import annotations

from collections import Counter

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite.codegen.forms import (
    IN,
    OUT,
    TOKENS,
    Base,
    Dense,
    Diagonal,
    Form,
    LowRank,
    Scaled,
    Shift,
    Spread,
)
from rewrite.codegen.maps import LINEAR, Convolution, Lookup, Matmul, Rows

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
    torch.testing.assert_close(delta.apply(x, scale=0.25), expected * 0.25, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_terms_add_up(form):
    delta, x = form(), matrix(4, INNER)
    total = sum((term.apply(x) for term in delta.terms()), torch.zeros(4, OUTER, dtype=torch.float64))
    torch.testing.assert_close(total, delta.apply(x), rtol=1e-12, atol=1e-12)


ROWS = [Rows(1, 0, 7, 15), Rows(1, 8, 15, 15), Rows(7, 1, 2, 3), Rows(1, 0, 7, 7)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_update_of_some_rows_is_one_of_the_whole(form, rows):
    delta, x = form(), matrix(4, INNER)
    for whole in (delta.spread(rows), Spread(delta, rows)):
        torch.testing.assert_close(whole.apply(x), rows.put(delta.apply(x), -1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole.materialise(), rows.put(delta.materialise()), rtol=1e-12, atol=1e-12)
        shift, part = whole.shift(), delta.shift()
        assert (shift is None) == (part is None)
        if part is not None:
            assert torch.equal(shift, rows.put(part, -1))
        assert whole.map(lambda t: t.to(torch.float32)).materialise().dtype == torch.float32
        assert whole.cost() == delta.cost()


LAYERS = {"linear": LINEAR, "transposed": Matmul(True), "lookup": Lookup(), "convolution": Convolution((5,))}


@pytest.mark.parametrize("rows", [None, Rows(1, 2, 9, 15), Rows(7, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_updated_weight(form, layer, rows):
    delta, base = form(), matrix(OUTER if rows is None else rows.width, INNER)
    W = layer.stored(base, ()).clone()
    update = delta.materialise()
    expected = layer.stored(base + 0.25 * (update if rows is None else rows.put(update)), W.shape)
    for found in (delta.add_to(W, layer, rows, 0.25), Form.add_to(LowRankOnly(delta), W, layer, rows, 0.25)):
        assert found.shape == W.shape
        torch.testing.assert_close(found + 0.0, expected, rtol=1e-12, atol=1e-12)


class LowRankOnly(Form):
    """A form that only knows its dense update."""

    def __init__(self, inner: Form) -> None:
        self.inner = inner

    def materialise(self) -> Tensor:
        return self.inner.materialise()


def test_a_stack_of_updates():
    delta = LowRank(matrix(4, OUTER, RANK), matrix(4, RANK, INNER)) - LowRank(matrix(4, OUTER, 2), matrix(4, 2, INNER))
    assert isinstance(delta, LowRank)
    for layer in (Matmul(), Matmul(True)):
        base = matrix(4, OUTER, INNER)
        W = layer.stored(base, ()).clone()
        found = layer.matrix(delta.add_to(W, layer) + 0.0)
        torch.testing.assert_close(found, base + delta.materialise(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_through_a_convolution_and_an_embedding(form):
    delta = form()
    dense, shift = delta.materialise() + torch.zeros(OUTER, INNER, dtype=torch.float64), delta.shift()
    ids, x, bias = torch.randint(0, INNER, (2, 3)), matrix(2, 1, 9), torch.zeros(OUTER) if shift is None else shift
    y = torch.nn.functional.embedding(ids, dense.t()) + bias
    torch.testing.assert_close(delta.apply(ids, Lookup(), like=y), y, rtol=1e-12, atol=1e-12)
    layer = Convolution((INNER,), padding=(1,))
    y = torch.nn.functional.conv1d(x, dense[:, None], bias.double(), padding=1)
    torch.testing.assert_close(delta.apply(x, layer) + 0 * y, y, rtol=1e-12, atol=1e-12)


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
    x = torch.randn(4, INNER, dtype=torch.bfloat16)
    assert form.apply(x).dtype == torch.bfloat16
    assert form.apply(x[:, None], Convolution((INNER,))).dtype == torch.bfloat16
    assert form.apply(torch.zeros(4, dtype=torch.long), Lookup(), like=x).dtype == torch.bfloat16
    assert (form.add_to(x.new_zeros(OUTER, INNER)) + 0).dtype == torch.bfloat16
    assert (form.add_to(x.new_zeros(INNER, OUTER), Lookup()) + 0).dtype == torch.bfloat16


def test_cost_counts_multiply_adds():
    cost = (low_rank() + Shift(matrix(OUTER))).cost()
    assert sympy.simplify(cost - TOKENS * RANK * (IN + OUT)) == 0


def test_the_base_class_states_nothing():
    for call in (lambda d: d.apply(matrix(1, 1)), lambda d: d.materialise(), lambda d: d.factored(matrix(1, 1))):
        with pytest.raises(NotImplementedError):
            call(Form())
    assert Form().shift() is None
    assert Scaled(Form(), 2.0).shift() is None


def test_row_norms_of_an_adapted_weight_form_nothing():
    W, update = matrix(OUTER, INNER), low_rank() * 0.7 - low_rank(2) * 1.3
    adapted = Base(W) + update
    dense = torch.linalg.vector_norm(W + update.materialise(), dim=-1)
    torch.testing.assert_close(adapted.row_norms(), dense, rtol=1e-12, atol=1e-12)
    scaled = Diagonal(matrix(OUTER)) @ adapted
    torch.testing.assert_close(scaled.row_norms(), dense * scaled.left.d.abs(), rtol=1e-12, atol=1e-12)  # type: ignore[attr-defined]
    with Shapes() as shapes:
        adapted.row_norms()
    assert (OUTER, INNER) not in shapes.made  # neither the update nor the adapted weight


class Shapes(TorchDispatchMode):
    """Remembers the shape of everything that is computed, views aside, and by what products multiply, how often."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()
        self.products: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.products[tuple(args[1].shape)] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.made.add(tuple(result.shape))
        return result


def test_cores_stand_between_the_factors():
    for core in (matrix(RANK), matrix(RANK, RANK)):
        form, x = LowRank(matrix(OUTER, RANK), matrix(RANK, INNER), core), matrix(4, INNER)
        middle = torch.diag(core) if core.ndim == 1 else core
        assert_close(form.materialise(), form.B @ middle @ form.A)
        assert_close(form.apply(x), x @ form.materialise().t())
        assert_close(form.T.materialise(), form.materialise().t())
        other = low_rank()
        assert_close((form + other).materialise(), form.materialise() + other.materialise())


def test_products_and_diagonals():
    left, right = Diagonal(matrix(OUTER)), Diagonal(matrix(INNER))
    middle, x = Dense(matrix(OUTER, INNER)), matrix(4, INNER)
    product = left @ middle @ right
    dense = left.materialise() @ middle.M @ right.materialise()
    assert_close(product.materialise(), dense)
    assert_close(product.T.materialise(), dense.t())
    U, S, Vh = torch.linalg.svd(middle.M, full_matrices=False)
    assert_close((left @ LowRank(U * S, Vh) @ right).apply(x), x @ dense.t())


def test_the_base_is_a_tensor_where_it_must_be():
    W = matrix(OUTER, INNER)
    assert_close(torch.softmax(Base(W), -1), torch.softmax(W, -1))
    assert_close(Base(W).abs(), W.abs())
    assert_close((Base(W) + Dense(W)).materialise(), 2 * W)


def test_what_rewriting_adds_to_a_base_multiplies_it_once():
    base, x, d = Base(matrix(OUTER, INNER)), matrix(4, INNER), Diagonal(matrix(OUTER))
    core = LowRank(matrix(OUTER, RANK), matrix(RANK, INNER), matrix(RANK))
    formed = Dense(matrix(OUTER, INNER))
    for made, products in [
        (base + low_rank() * 0.5, 0),
        (d @ (base + low_rank() * 0.5), 1),
        (d @ (base + core), 1),
        (base + low_rank() + formed, 1),
        (d @ (base + formed), 2),
        (formed, 2),
    ]:
        update = made.less(base)
        assert_close(update.materialise(), made.materialise() - base.W)
        with Shapes() as shapes:
            found = sum(term.apply(x) for term in update.terms())
        assert_close(found, made.apply(x) - base.apply(x))
        assert shapes.products[INNER, OUTER] == products


def test_gates():
    x, gate = matrix(3, 4, INNER), torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    for form in (low_rank() * 0.5, low_rank() + Shift(matrix(OUTER)), Dense(matrix(OUTER, INNER))):
        assert_close(form.gated(gate[1:2]).apply(x), form.apply(x) * 2)
        assert_close(form.gated(gate.view(3, 1, 1)).apply(x), form.apply(x) * gate.view(3, 1, 1))
        assert_close(form.gated(gate[1:2]).materialise(), form.materialise() * 2)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
