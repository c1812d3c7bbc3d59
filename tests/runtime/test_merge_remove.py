"""merge and remove: what they report, and every state that a model may be in when they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.attach import adapter_state
from rewrite.runtime.merge import merge_report
from tests.models import assert_close, batch, build, changed, disturb, frozen, gradients, step, traces

SPEC = "lora(r=3)@linear + nf4(linear) + full(norm)"


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(19, 13, bias=bias), nn.LayerNorm(13)
        self.second = nn.Linear(13, 7, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def net(dtype: torch.dtype = torch.float64, bias: bool = True) -> Net:
    torch.manual_seed(3)
    return Net(bias).to(dtype)


def x(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_an_attached_model_has_traces():
    found = traces(rewrite.compile(net(), SPEC, backend="eager"))
    assert {"._rewrite", "first.adapters", "first: ParametrizedLinear", "a compiled call"} <= set(found)
    assert any("call_adapters" in trace for trace in found)


def test_merge_reports_what_it_did():
    model = rewrite.merge(disturb(rewrite.attach(net(), "lora(r=3)@linear")))
    report = merge_report(model)
    assert report is not None
    assert (report.spec, report.weights, report.decoded, report.error) == ("lora(r=3)@linear", 2, 0, 0.0)
    assert str(report) == "merged 'lora(r=3)@linear' into 2 weights"
    assert merge_report(net()) is None


def test_merge_reports_a_quantised_base():
    model = rewrite.merge(disturb(rewrite.attach(net(), SPEC)))
    assert str(merge_report(model)) == (
        "merged 'lora(r=3)@linear + nf4(linear) + full(norm)' into 2 weights, 2 of them decoded from a quantised base "
        "(a dense copy replaces the codes)"
    )


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_merge_measures_its_rounding(dtype: torch.dtype, digits: int):
    model = disturb(rewrite.attach(net(dtype), "lora(r=3)@linear"))
    weights = {n: model.get_parameter(f"{n}.weight").detach().double() for n in ("first", "second")}
    state = {n: t.double() for n, t in adapter_state(model).items()}
    errors = {}
    for name, weight in weights.items():
        exact = weight + state[f"{name}.adapters.lora.B"] @ state[f"{name}.adapters.lora.A"]
        rounded = exact.to(dtype)
        errors[name] = float((rounded.double() - exact).abs().max() / exact.abs().max())
        weights[name] = rounded
    report = merge_report(rewrite.merge(model))
    assert report is not None
    assert report.worst == max(errors, key=lambda n: errors[n])
    assert report.error == pytest.approx(max(errors.values()), rel=1e-6)
    assert 0 < report.error <= 2.0**-digits
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)


def test_several_adapters_at_one_site_merge_together():
    model = disturb(rewrite.attach(net(), "lora(r=3)@linear + lora(r=2, alpha=5)@linear + lora(r=4)@/second/"))
    expected = model(x())
    assert_close(rewrite.merge(model)(x()), expected)


def test_a_shift_merges_into_a_new_bias():
    model = disturb(rewrite.attach(net(bias=False), "lora(r=3, bias=true)@linear"))
    expected = model(x())
    assert_close(rewrite.merge(model)(x()), expected)
    assert str(model) == str(net())  # with a bias
    assert traces(model) == []


def test_a_part_merges_into_its_rows_alone():
    model, before = build("gpt2"), frozen(build("gpt2"))
    disturb(rewrite.attach(model, "lora(r=3, bias=true)@attn.v[1]"))
    expected = model(**batch("gpt2")).logits
    rewrite.merge(model)
    assert_close(model(**batch("gpt2")).logits, expected)
    weight, bias = (f"transformer.h.1.attn.c_attn.{n}" for n in ("weight", "bias"))
    after = frozen(model)
    assert changed(before, after) == [bias, weight]
    assert torch.equal(after[weight][:, :128], before[weight][:, :128])  # stored as (d_in, d_out)
    assert torch.equal(after[bias][:128], before[bias][:128])
    assert not torch.equal(after[bias][128:], before[bias][128:])


def test_merge_of_dropout_is_the_function_of_evaluation():
    model = disturb(rewrite.attach(net(), "lora(r=3, dropout=0.5)@linear")).train()
    expected = model.eval()(x())
    model.train()
    assert_close(rewrite.merge(model)(x()), expected)
    assert model.training


@pytest.mark.parametrize("act", [rewrite.merge, rewrite.remove])
def test_parameters_keep_their_order_and_flags(act: Callable[[nn.Module], nn.Module]):
    model = net()
    model.norm.bias.requires_grad_(False)
    names, flags = [n for n, _ in model.named_parameters()], [p.requires_grad for p in model.parameters()]
    act(rewrite.attach(model, SPEC))
    assert [n for n, _ in model.named_parameters()] == names  # an optimizer's state goes by the order
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [n for n, _ in model.named_buffers()] == []
    assert traces(model) == []
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("act", [rewrite.merge, rewrite.remove])
def test_a_copy_is_no_business_of_the_original(act: Callable[[nn.Module], nn.Module]):
    model = disturb(rewrite.attach(net(), SPEC))
    expected, twin = model(x()), copy.deepcopy(model)
    act(twin)
    assert torch.equal(model(x()), expected)
    assert traces(twin) == []
    other = copy.deepcopy(model)
    act(model)
    assert torch.equal(other(x()), expected)
    assert traces(model) == []


@pytest.mark.parametrize("act", [rewrite.merge, rewrite.remove])
def test_after_the_model_was_cast(act: Callable[[nn.Module], nn.Module]):
    model = disturb(rewrite.attach(net(), SPEC))
    model.to(torch.float32)
    expected = model(x(torch.float32)) if act is rewrite.merge else net(torch.float32)(x(torch.float32))
    act(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(model(x(torch.float32)), expected, 1e-6)


def test_remove_after_training():
    model, before = build("llama"), frozen(build("llama"))
    disturb(rewrite.compile(model, "lora(r=4)@attn.q,v + nf4(base) + full(norm, head)", backend="eager"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch("llama")).loss.backward()
        optimizer.step()
    rewrite.remove(model)
    assert changed(before, frozen(model)) == []
    assert traces(model) == []
    assert torch.equal(model(**batch("llama")).logits, build("llama")(**batch("llama")).logits)


def test_merge_after_training_keeps_what_was_trained():
    model = disturb(rewrite.attach(net(), "lora(r=3)@linear + full(norm)"))
    model(x()).square().sum().backward()
    norm = model.norm.weight.detach().clone()
    expected = model(x())
    rewrite.merge(model)
    assert torch.equal(model.norm.weight, norm)
    assert_close(model(x()), expected)
    model.zero_grad()
    model(x()).square().sum().backward()  # a plain model again: everything trains
    assert sorted(gradients(model)) == sorted(n for n, _ in model.named_parameters())


def test_a_failed_attachment_leaves_the_model_as_it_was():
    model = net()
    model.second.weight.data[0, 0] = torch.inf
    before, flags = frozen(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.attach(model, SPEC)
    assert str(caught.value) == "NF4 cannot store a weight that holds inf or nan; repair the weight, or exclude it"
    assert changed(before, frozen(model)) == []
    assert [p.requires_grad for p in model.parameters()] == flags
    assert traces(model) == []


def test_hooks_and_parametrisations_of_the_user_stay():
    model, calls = net(), []
    model.first.register_forward_hook(lambda *_: calls.append("after"))
    model.second.register_forward_pre_hook(lambda *_: calls.append("before"))
    nn.utils.parametrize.register_parametrization(model.norm, "weight", nn.Softplus())
    expected = model(x())
    for act in (rewrite.remove, rewrite.merge):
        rewrite.attach(model, "lora(r=3)@linear")
        model(x())
        act(model)
    assert torch.equal(model(x()), expected)
    assert calls == ["after", "before"] * 4
    assert nn.utils.parametrize.is_parametrized(model.norm, "weight")


def test_a_merged_model_is_adapted_again():
    model: Any = disturb(rewrite.attach(build("llama"), "lora(r=4)@attn.q,v"))
    first = model(**batch("llama")).logits
    rewrite.merge(model)
    disturb(rewrite.attach(model, "lora(r=2)@ffn"))
    second = step(model, model, batch("llama"))[0].logits
    rewrite.remove(model)
    assert_close(model(**batch("llama")).logits, first)
    assert not torch.equal(first, second)
