"""linear_cross_entropy: the loss and the gradients of a head's logits, in chunks, against `F.cross_entropy`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from rewrite.codegen import cross_entropy, torch_chunks
from rewrite.codegen.nf4 import quantize
from rewrite.codegen.rowwise import Chain
from rewrite.codegen.storage import Nf4
from rewrite.errors import RewriteError
from tests.models import assert_close

Tensor = torch.Tensor
D, V = 7, 31


@pytest.fixture(autouse=True, params=["PyTorch's chunks", "ours"] if torch_chunks.available() else ["ours"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk, so that a handful of tokens has several, and a last one that is shorter."""
    if request.param == "ours":
        monkeypatch.setattr(torch_chunks, "available", lambda: False)
    monkeypatch.setattr(cross_entropy, "_LOGITS", 5 * V)
    monkeypatch.setattr(cross_entropy, "_ROWS", 1)


@dataclass
class Case:
    """A head and a loss; `plain` and `fused` are the two ways to compute them."""

    rows: int = 23
    dtype: torch.dtype = torch.float64
    bias: bool = True
    branches: tuple[tuple[int, int], ...] = ()  # (first column, columns)
    steps: str = ""
    class_weight: bool = False
    ignored: str = "some"
    trains: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.rows)

        def make(*shape: int, trains: bool) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype).requires_grad_(trains)

        self.x = make(self.rows, D, trains=True)
        self.W = make(V, D, trains=self.trains)
        self.b = make(V, trains=self.trains) if self.bias else None
        self.h = [make(self.rows, 3, trains=True) for _ in self.branches]
        self.B = [make(size, 3, trains=self.trains) for _, size in self.branches]
        self.scale = [0.5 + i for i in range(len(self.branches))]
        self.target = torch.randint(0, V, (self.rows,), generator=g)
        if self.ignored != "none":
            self.target[:: 1 if self.ignored == "all" else 3] = self.options.get("ignore_index", -100)
        self.c = torch.rand(V, generator=g, dtype=torch.float64) if self.class_weight else None

    @property
    def inputs(self) -> list[Tensor]:
        found = [self.x, self.W, self.b, *self.h, *self.B]
        return [t for t in found if t is not None and t.requires_grad]

    def fused(self) -> Tensor:
        o = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0} | self.options
        start = [first for first, _ in self.branches]
        return torch.ops.rewrite.linear_cross_entropy(
            self.x, [self.W], "dense", self.b, self.h, self.B, self.scale, start,
            self.target, self.c, self.steps, o["reduction"], o["ignore_index"], o["label_smoothing"],
        )  # fmt: skip

    def plain(self) -> Tensor:
        y = F.linear(self.x, self.W, self.b)
        for (first, size), h, B, s in zip(self.branches, self.h, self.B, self.scale, strict=True):
            y = y + F.pad(s * h @ B.t(), (first, V - first - size))
        y = Chain.parse(self.steps).forward(y)[0]
        weight = None if self.c is None else self.c.to(y.dtype)
        return F.cross_entropy(y, self.target, weight=weight, **self.options)


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    up = torch.linspace(0.3, 1.7, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad(loss, inputs, up))


def assert_equal(case: Case, tolerance: float = 1e-13) -> None:
    found, expected = case.fused(), case.plain()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    for ours, theirs in zip(gradients(found, case.inputs), gradients(expected, case.inputs), strict=True):
        assert_close(ours, theirs, tolerance)


REDUCTIONS = [{"reduction": "mean"}, {"reduction": "sum"}, {"label_smoothing": 0.1}]


@pytest.mark.parametrize("class_weight", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("options", REDUCTIONS, ids=["mean", "sum", "smooth"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_cross_entropy(bias, options, class_weight):
    assert_equal(Case(bias=bias, options=options, class_weight=class_weight))
    assert_equal(Case(bias=bias, options={**options, "ignore_index": 4}, class_weight=class_weight, ignored="none"))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 10, 11])
def test_chunk_boundaries(rows):
    assert_equal(Case(rows=rows, ignored="none"))
    assert_equal(Case(rows=rows, ignored="none", options={"reduction": "none"}, trains=False))


@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_to_count(reduction, class_weight):
    case = Case(rows=8, ignored="all", class_weight=class_weight, trains=False, options={"reduction": reduction})
    assert bool(case.fused().isnan().any()) == (reduction == "mean")
    assert_equal(case)
    empty = Case(rows=0, class_weight=class_weight, trains=False, options={"reduction": reduction})
    torch.testing.assert_close(empty.fused(), empty.plain(), equal_nan=True)
    assert gradients(empty.fused(), [empty.x])[0].shape == (0, D)


@pytest.mark.parametrize("options", [*REDUCTIONS, {"reduction": "none"}], ids=["mean", "sum", "smooth", "none"])
def test_branches_of_an_adapter(options):
    trains = options.get("reduction") != "none"
    assert_equal(Case(branches=((0, V), (4, 11)), options=options, trains=trains))


STEPS = ["div:3.0,tanh,mul:3.0", "mul:0.0625", "tanh,tanh", "to:float32,mul:0.5,to:float64"]


@pytest.mark.parametrize("steps", STEPS)
def test_steps_between_head_and_loss(steps):
    assert_equal(Case(steps=steps), 1e-6 if "float32" in steps else 1e-13)


def test_rows_of_their_own_weight():
    case = Case(options={"reduction": "none"}, trains=False, branches=((0, V),))
    assert case.fused().shape == (23,)
    assert_equal(case)
    with pytest.raises(RewriteError, match="no gradient for the parameters"):
        Case(options={"reduction": "none"}).fused()


def test_gradcheck():
    case = Case(rows=6, branches=((2, 9),), options={"label_smoothing": 0.2}, class_weight=True, steps="tanh")

    def fused(x: Tensor, W: Tensor, b: Tensor, h: Tensor, B: Tensor) -> Tensor:
        again = replace(case)
        again.x, again.W, again.b, again.h, again.B = x, W, b, [h], [B]
        return again.fused()

    assert torch.autograd.gradcheck(fused, case.inputs)


# dx is rounded once more where the gradient of the loss is no power of two (of a mean it is 1), dW once a chunk.
@pytest.mark.parametrize(("up", "bounds"), [(1.0, (1.1, 1.5)), (0.3, (1.5, 1.5))])
@pytest.mark.parametrize("wide", [True, False], ids=["loss in float32", "loss in bfloat16"])
def test_bfloat16_is_as_exact_as_the_plain_computation(wide, up, bounds):
    case = Case(rows=64, dtype=torch.bfloat16, bias=False, steps="to:float32" if wide else "")
    exact = replace(case, dtype=torch.float64, steps="")
    exact.x, exact.W = (t.detach().double().requires_grad_() for t in (case.x, case.W))
    found, plain, reference = case.fused(), case.plain(), exact.plain()
    assert found.dtype == plain.dtype
    assert abs(found - reference) <= max(abs(plain - reference), 2e-3 * reference)
    pairs = (found, case), (plain, case), (reference, exact)
    ours, theirs, true = (torch.autograd.grad(up * loss, c.inputs) for loss, c in pairs)
    for bound, a, b, c in zip(bounds, ours, theirs, true, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - c).norm() < bound * (b.double() - c).norm()


def test_half_precision_does_not_underflow():
    """1 / rows is put on in float32, after the products."""
    case = Case(rows=4096, dtype=torch.float16, bias=False, trains=False, ignored="none", steps="to:float32")
    exact = replace(case, dtype=torch.float64, steps="")
    exact.x, exact.W = case.x.detach().double().requires_grad_(), case.W.detach().double()
    scale = 2.0**12  # a gradient scaler's
    (found,), (true,) = (torch.autograd.grad(c.fused() * scale, [c.x]) for c in (case, exact))
    assert (found.double() - true).norm() < 2e-3 * true.norm()


def test_a_stored_weight_is_decoded_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    decode = cross_entropy.decode
    monkeypatch.setattr(cross_entropy, "decode", lambda *args: calls.append(1) or decode(*args))
    stored, layout = quantize(torch.randn(V, D, dtype=torch.float64)), str(Nf4((V, D), torch.float64))
    case = Case(trains=False)
    case.W = decode(stored, layout)
    found = torch.ops.rewrite.linear_cross_entropy(
        case.x, list(stored), layout, case.b, [], [], [], [], case.target, None, "", "mean", -100, 0.0
    )
    assert calls == [1]
    assert_close(found, case.plain(), 1e-13)
    assert_close(*(torch.autograd.grad(loss, [case.x])[0] for loss in (found, case.plain())), 1e-13)


def test_not_contiguous():
    case = Case()
    case.x = torch.randn(D, 23, dtype=torch.float64).t().requires_grad_()
    case.W = torch.randn(D, V, dtype=torch.float64).t().requires_grad_()
    assert_equal(case)


def test_floating_point_operations_are_those_of_the_products():
    plain, fused = FlopCounterMode(display=False), FlopCounterMode(display=False)
    for trains in (False, True):
        case = Case(trains=trains, bias=False, branches=((3, 20),))
        with plain:
            gradients(case.plain(), case.inputs)
        with fused:
            gradients(case.fused(), case.inputs)
        assert fused.get_total_flops() == plain.get_total_flops()


def test_a_target_that_is_no_class():
    case = Case()
    case.target[3] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        case.fused()


def test_no_second_derivative():
    case = Case()
    (first,) = torch.autograd.grad(case.fused(), [case.x], create_graph=True)
    with pytest.raises(RewriteError, match="no second derivative"):
        first.square().sum().backward()


def test_without_gradients_nothing_is_computed_for_them():
    case = Case()
    with torch.no_grad():
        assert not case.fused().requires_grad
    plain, alone = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad(), plain:
        case.plain()
    with torch.no_grad(), alone:
        case.fused()
    assert alone.get_total_flops() == plain.get_total_flops()


def test_opcheck():
    case = Case(rows=6, branches=((2, 9),))
    rest = case.target, None, "", "sum", -100, 0.0, None, [True] * 5
    args = (case.x, [case.W], "dense", case.b, case.h, case.B, [0.5], [2], *rest)
    torch.library.opcheck(
        torch.ops.rewrite.linear_cross_entropy_core.default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has none of its own")
def test_what_the_installed_version_has_is_used(monkeypatch: pytest.MonkeyPatch):
    calls, summed = [], torch_chunks.summed
    monkeypatch.setattr(torch_chunks, "available", lambda: True)
    monkeypatch.setattr(torch_chunks, "summed", lambda *args: calls.append(1) or summed(*args))
    assert torch_chunks._find() is not None
    assert_equal(Case(class_weight=True))
    assert calls == [1]
    for other in (Case(dtype=torch.bfloat16, steps="to:float32"), Case(options={"label_smoothing": 0.1})):
        other.fused()
    Case(branches=((0, V),)).fused()
    Case(steps="tanh").fused()
    assert calls == [1]
