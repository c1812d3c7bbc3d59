"""DoRA in graphs: norms read stored weights, a layer that it states anew is fused, and on a GPU its scale is too."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import rewrite
from rewrite.codegen import scaled
from rewrite.passes import fuse
from rewrite.runtime.captures import records_of
from tests.models import assert_close, disturb

Tensor = torch.Tensor


def attached(spec: str, d_in: int, d_out: int, bias: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(d_in, d_out, bias)).to(dtype)
    return disturb(rewrite.compile(net, spec, backend="aot_eager", dynamic=False))


def results(function, x: Tensor, model: nn.Module, dy: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the input and of all that trains."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))


def check(model: nn.Module, x: Tensor) -> str:
    """Compare with eager, and return the program."""
    dy = torch.randn(*x.shape[:-1], model[0].out_features, dtype=x.dtype)
    found, expected = (results(f, x, model, dy) for f in (model, model.forward))
    assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-9, atol=1e-9)
    return records_of(model)[-1].after


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What graphs of a GPU are."""
    monkeypatch.setattr(fuse, "EPILOGUES", {"cpu"})


@pytest.fixture
def whatever_dtype(monkeypatch):
    monkeypatch.setattr(scaled, "apart", lambda *_: None)


def batch(d_in: int) -> Tensor:
    return torch.randn(4, 5, d_in, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 10), (10, 24)])
def test_a_layer_stated_anew_is_fused_and_not_batched_with_its_factors(d_in, d_out, bias):
    program = check(attached("dora(r=3)@linear", d_in, d_out, bias), batch(d_in))
    assert "adapted_linear(" in program
    assert "cat(" not in program
    assert program.count("adapted_row_norms(") == 1


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_stored_weight_is_not_decoded_in_the_graph(bias):
    program = check(attached("dora(r=3)@linear + nf4@linear", 64, 10, bias), batch(64))
    assert "decode(" not in program
    assert program.count("adapted_row_norms(") == program.count("adapted_linear(") == 1


def test_on_a_cpu_the_scale_is_left_to_the_compiler():
    model = attached("dora(r=3)@linear", 24, 10, False)
    assert "scaled_branch(" not in check(model, batch(24))
    assert "scale" not in " ".join(note.text for note in records_of(model)[0].notes)


@pytest.mark.usefixtures("on_a_gpu", "whatever_dtype")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("storage", ["", " + nf4@linear"], ids=["dense", "nf4"])
def test_dropout_is_of_what_is_added_to_the_base(storage, bias):
    """W x + (d - 1) W z + d s B A z for z = dropout(x), as HF PEFT has it, by two products with W."""
    model = attached(f"dora(r=3, alpha=6, dropout=0.3)@linear{storage}", 64, 10, bias).train()
    x, dy = batch(64), torch.randn(4, 5, 10, dtype=torch.float64)
    layer = model[0]
    A, B, m = (p for p in model.parameters() if p.requires_grad)
    W, shift = layer.weight.detach(), layer.bias if bias else 0.0

    def plain(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        dropped = torch.ops.rewrite.dropout(x, torch.ops.rewrite.draw(x), 0.3)
        d = m / torch.linalg.vector_norm(W + 2 * B @ A, dim=-1).detach()
        return x @ W.t() + (d - 1) * (dropped @ W.t()) + d * 2 * (dropped @ A.t() @ B.t()) + shift

    def seeded(function):
        return lambda x: (torch.manual_seed(7), function(x))[1]

    expected = results(plain, x, model, dy)
    for call in (model, model.forward):
        torch.testing.assert_close(results(seeded(call), x, model, dy), expected, rtol=1e-9, atol=1e-9)
    program = records_of(model)[-1].after
    assert len(re.findall(r"linear\(\w+, \[?_0_(?:weight|parametrizations)", program)) == 2
    assert "cat(" not in program


@pytest.mark.usefixtures("on_a_gpu", "whatever_dtype")
class TestTheScaleJoinsTheBranch:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize(
        "spec",
        [
            "dora(r=3)@linear",
            "dora(r=3)@linear + nf4@linear",
            "lora(r=3)@linear + ia3@linear",
            "lora(r=3)@linear + vera(r=4)@linear + ia3@linear",  # the other branch stays where it is
            "a: dora(r=3)@linear",
        ],
    )
    def test_of_methods(self, spec, bias):
        model = attached(spec, 64, 10, bias)
        program = check(model, batch(64))
        assert program.count("scaled_branch(") == 1
        assert ("vera" in spec) == bool(re.search(r"adapted_linear\(.*\[getitem_\d+\]", program))
        assert "rewrite.scaled_branch" in rewrite.explain(model)

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(1, 24),
            torch.randn(0, 24),
            torch.randn(3, 0, 24),
            torch.randn(24),
            torch.randn(24, 7).t(),
            torch.randn(5, 3, 24).transpose(0, 1),
        ],
        ids=["one row", "no rows", "no tokens", "a vector", "transposed", "swapped"],
    )
    def test_of_inputs(self, x):
        assert "scaled_branch(" in check(attached("dora(r=3)@linear", 24, 10, True), x.double())

    def test_where_the_magnitude_is_zero(self):
        model = attached("dora(r=3)@linear", 24, 10, True)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("_m") or n.endswith(".m"))[2:4] = 0.0
        assert "scaled_branch(" in check(model, batch(24))


def test_eager_trains_every_factor_under_autocast():
    model = attached("dora(r=4)@linear", 48, 40, True, torch.float32)
    x, dy = torch.randn(30, 48), torch.randn(30, 40)
    exact = results(model.forward, x, model, dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model.forward, x, model, dy)
    for ours, reference in zip(found, exact, strict=True):
        assert (ours - reference).norm() <= 0.02 * reference.norm()


@pytest.mark.usefixtures("on_a_gpu")
class TestInBfloat16:
    def test_under_autocast(self):
        model = attached("dora(r=4)@linear", 48, 40, True, torch.float32)
        x, dy = torch.randn(30, 48), torch.randn(30, 40)

        def cast(x: Tensor, forward=model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        found = results(cast, x, model, dy)
        assert "scaled_branch(" in records_of(model)[-1].after
        assert found[0].dtype == torch.bfloat16
        eager = results(lambda x: cast(x, model.forward), x, model, dy)
        exact = results(model.forward, x, model, dy)
        for ours, theirs, reference in zip(found, eager, exact, strict=True):
            error, other = ((t.double() - reference.double()).norm() for t in (ours, theirs))
            assert error <= 1.2 * other + 1e-3 * reference.double().norm()

    @pytest.mark.parametrize(
        ("rank", "dtype", "reason"),
        [
            (64, torch.bfloat16, "rank 64: parts of its gradients would take 512 bytes a row to save 160"),
            (70, torch.bfloat16, "rank 70, not in 1 ... 64"),
            (4, torch.float32, "outputs of torch.float32 and a scale of torch.float32, not both of bfloat16"),
        ],
        ids=str,
    )
    def test_a_scale_apart_has_its_reason(self, rank, dtype, reason):
        model = attached(f"dora(r={rank})@linear", 48, 40, True, dtype)
        model(torch.randn(3, 48, dtype=dtype))
        assert "scaled_branch(" not in records_of(model)[-1].after
        assert "rewrite.adapted_linear, plain operators" in rewrite.explain(model)
        assert f"its scale is not fused: {reason}" in rewrite.explain(model)
