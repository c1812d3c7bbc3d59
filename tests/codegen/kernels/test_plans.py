"""Plans: made once for each layout of the tensors, anew where shapes, strides, dtypes or scales change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rewrite.codegen import nf4
from rewrite.codegen.kernels import dropout, gradients, linear, nf4_linear, plans
from rewrite.codegen.kernels.kernel import Kernel
from rewrite.codegen.kernels.products import SumOfProducts, Term
from rewrite.codegen.storage import Nf4

Tensor = torch.Tensor


@pytest.fixture
def built(monkeypatch) -> list[type]:
    """The kernels that are constructed, in order."""
    found: list[type] = []

    def counted(init):
        def build(self, *arguments, **options):
            found.append(type(self))
            init(self, *arguments, **options)

        return build

    for cls in _subclasses(Kernel):
        monkeypatch.setattr(cls, "__init__", counted(cls.__init__))
    return found


def _subclasses(cls: type) -> list[type]:
    return [each for direct in cls.__subclasses__() for each in (direct, *_subclasses(direct))]


def values(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def nf4_product(device: torch.device) -> None:
    packed = nf4.Nf4Tensors.from_weight(torch.randn(72, 288, device=device), 32)
    stored, layout = [packed.codes, packed.absmax], str(Nf4((72, 288), torch.bfloat16, 32))
    branch = [values(1, 3, device=device)], [values(72, 3, device=device)], [2.0], [0], []
    arguments = (values(1, 288, device=device), stored, layout, None, *branch)
    assert nf4_linear.supports_product(*arguments) is None
    nf4_linear.product(*arguments)
    dy = values(1, 72, device=device)
    assert nf4_linear.supports_input_gradient(dy, stored, layout) is None
    nf4_linear.input_gradient(dy, stored, layout)


def dense_product(device: torch.device) -> None:
    x, h, W, B = (values(*shape, device=device) for shape in ((5, 136), (5, 3), (72, 136), (72, 3)))
    linear.supports_product(x, [W], "dense", None, [h], [B], [2.0], [0], [])
    total = linear.Sum([x, h], [W.t(), B.t()], [1.0, 2.0], [0, 0])
    assert total.supports() is None
    total.fused(x.new_empty(5, 72))


def low_rank_gradients(device: torch.device) -> None:
    dy, h, B = (values(*shape, device=device) for shape in ((70, 136), (70, 3), (136, 3)))
    gradients.supports(dy, h, B)
    gradients.low_rank_gradients(dy, h, B, 2.0)


def dropped_linear(device: torch.device) -> None:
    x, A, dh = (values(*shape, device=device) for shape in ((5, 136), (3, 136), (5, 3)))
    seed = torch.ones(1, dtype=torch.int64, device=device)
    assert dropout.supports(x, A, [3], [0.1]) is None
    dropout.linear(x, A, seed, [3], [0.1])
    dropout.gradient(dh, x, seed, [3], [0.1])
    dropout.input_gradient(dh, A, seed, [3], [0.1], x, add=True)
    dropout.dropout(x, seed, 0.1)


@pytest.mark.parametrize("call", [nf4_product, dense_product, low_rank_gradients, dropped_linear])
def test_a_second_call_builds_no_kernel(call: Callable[[torch.device], None], built, device):
    call(device)
    assert built
    built.clear()
    call(device)
    assert not built


def test_whatever_the_plan_may_depend_on_plans_anew():
    planned: list[tuple] = []

    @plans.by_layout
    def plan(*arguments):
        planned.append(arguments)
        return len(planned)

    x = torch.zeros(4, 6)
    calls = [
        (x, [x], [2.0], False),
        (x[:3], [x], [2.0], False),
        (x.t().contiguous().t(), [x], [2.0], False),
        (x.double(), [x], [2.0], False),
        (x.to("meta"), [x], [2.0], False),
        (x, [x[:, :3]], [2.0], False),
        (x, [x, x], [2.0], False),
        (x, [], [2.0], False),
        (x, [x], [3.0], False),
        (x, [x], [2.0], True),
        (x, None, [2.0], False),
    ]
    assert [plan(*each) for each in calls] == list(range(1, len(calls) + 1))
    assert [plan(*each) for each in calls] == list(range(1, len(calls) + 1))
    assert plan(torch.ones(4, 6), [x.clone()], (2.0,), False) == 1


def test_layouts_beyond_what_is_kept_are_planned_again(monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 2)
    planned = []
    plan = plans.by_layout(planned.append)
    for size in (1, 2, 3, 3, 1):
        plan(size)
    assert planned == [1, 2, 3, 1]


def test_autotuning_that_is_asked_for_later_is_heard(device, monkeypatch):
    x, h, W, B = (values(*shape, device=device) for shape in ((5, 136), (5, 3), (72, 136), (72, 3)))
    arguments = (x, [W], "dense", None, [h], [B], [2.0], [0], [])
    assert "too few" in (linear.supports_product(*arguments) or "")
    monkeypatch.setenv("REWRITE_AUTOTUNE", "1")
    assert linear.supports_product(*arguments) is None
    monkeypatch.delenv("REWRITE_AUTOTUNE")
    assert "too few" in (linear.supports_product(*arguments) or "")


def test_a_hash_is_of_all_fields_and_computed_once(monkeypatch):
    def kernel(scale: float) -> SumOfProducts:
        return SumOfProducts(72, (Term(136, 136, 1, 136), Term(3, 3, 1, 3, scale)), False, torch.bfloat16)

    assert kernel(2.0) == kernel(2.0)
    assert hash(kernel(2.0)) == hash(kernel(2.0)) != hash(kernel(3.0))
    hashed, of_term = [], Term.__hash__
    monkeypatch.setattr(Term, "__hash__", lambda self: hashed.append(self) or of_term(self))
    one = kernel(2.0)
    assert hash(one) == hash(one)
    assert len(hashed) == 2
