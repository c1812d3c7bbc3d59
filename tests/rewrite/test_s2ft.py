"""S2FT: which heads and channels are trained, that their gradients are slices of the dense one, and what is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.methods.s2ft import S2ft
from rewrite.runtime import captures
from rewrite.runtime.attach import adapter_of, attachment, require
from tests.models import assert_close, assert_same, batch, build, changed, disturb, frozen, gradients, step

SPEC = "s2ft(heads=1, channels=20)"
ROWS = "s2ft(heads=1, channels=20, by=weight)@attn.q,k,v,ffn.up,ffn.gate"


def positions(model: nn.Module) -> dict[str, list[int]]:
    """Which columns, or rows, of the matrix of every adapted weight are trained."""
    found = {}
    for graft in require(model).grafts:
        theta = adapter_of(model.get_submodule(graft.path), graft).operands()
        marked = [torch.ones_like(theta[0]), *theta[1:]]
        weight = model.get_submodule(graft.path).weight
        dense = graft.map.matrix(graft.merged(torch.zeros_like(weight), None, *marked)[0])  # type: ignore[misc]
        rows = dense.any(1).sum() < dense.any(0).sum()
        found[graft.path] = dense.any(1 if rows else 0).nonzero().flatten().tolist()
    return found


def fused(model: nn.Module) -> int:
    (record,) = captures.records_of(model)
    return sum(e.rule == "fuse_columns" for p in record.passes for e in p.edits)


def adapted(name: str, spec: str, backend: str | None = None, **changes: Any) -> nn.Module:
    model = build(name, **changes)
    return rewrite.attach(model, spec) if backend is None else rewrite.compile(model, spec, backend=backend)


SCATTERED = "s2ft(heads=1, channels=20, by=weight, take=small)"
EAGER = [(n, s, None) for n in ("llama", "gpt2", "qwen3", "bert") for s in (SPEC, SCATTERED, ROWS)]
COMPILED = [("llama", SPEC), ("gpt2", SPEC), ("qwen3", SCATTERED), ("llama", ROWS)]


@pytest.mark.parametrize(("name", "spec", "backend"), [*EAGER, *((n, s, "aot_eager") for n, s in COMPILED)])
def test_gradients_are_slices_of_the_dense_weight_gradient(name, spec, backend):
    if name in ("gpt2", "bert"):
        spec = spec.replace(",ffn.gate", "")
    small: dict[str, Any] = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    model, whole = disturb(adapted(name, spec, backend, **small)), build(name, **small)
    grafts, inputs = require(model).grafts, batch(name)
    theta = {g.name + g.path: adapter_of(model.get_submodule(g.path), g).operands() for g in grafts}
    with torch.no_grad():
        for g in grafts:
            module = whole.get_submodule(g.path)
            module.weight.copy_(g.merged(module.weight, None, *theta[g.name + g.path])[0])  # type: ignore[misc,operator]
    output, found = step(model, model, inputs)
    expected, dense = step(whole, whole, inputs)
    assert_close(output.loss, expected.loss)
    at = {g.path: g for g in grafts}
    assert len(found) == len(grafts)
    for g in grafts:
        values = theta[g.name + g.path][0].detach().clone().requires_grad_()
        W, _ = g.merged(torch.zeros_like(whole.get_submodule(g.path).weight), None, values, *theta[g.name + g.path][1:])  # type: ignore[misc,arg-type]
        wanted = torch.autograd.grad(W, values, dense[f"{g.path}.weight"])[0]
        key = next(k for k in found if k.startswith(f"{g.path}.adapters.{g.name}."))
        assert_close(found[key], wanted)
    assert at


@pytest.mark.parametrize(("spec", "edits"), [(SPEC, 2), (SCATTERED, 0)])
def test_a_run_is_cut_out_of_the_base_product_and_scattered_columns_are_added(spec, edits):
    model = adapted("llama", spec, "eager", num_hidden_layers=1)
    model(**batch("llama"))
    assert fused(model) == edits


def test_heads_are_whole_and_the_same_in_every_layer():
    model = adapted("llama", "s2ft(heads=2, channels=16, seed=3)")
    found = list(positions(model).values())
    heads, channels = found[0], found[1]
    assert heads == found[2]
    assert channels == found[3]
    assert heads == list(range(heads[0], heads[0] + 32))
    assert heads[0] % 16 == 0
    assert (channels[-1] + 1) % 16 == 0
    others = {
        tuple(positions(adapted("llama", f"s2ft(heads=2, channels=16, seed={s})"))["model.layers.0.mlp.down_proj"])
        for s in range(6)
    }
    assert len(others) > 1


@pytest.mark.parametrize("take", ["large", "small"])
def test_weight_chooses_by_magnitude(take):
    model, base = adapted("llama", f"s2ft(heads=2, channels=20, by=weight, take={take})"), build("llama")
    for path, found in positions(model).items():
        scores = base.get_submodule(path).weight.abs().sum(0)
        scores = scores.view(4, 16).sum(1) if "o_proj" in path else scores
        order = scores.argsort(descending=take == "large")[: 2 if "o_proj" in path else 20].sort().values
        wanted = (order[:, None] * 16 + torch.arange(16)).flatten() if "o_proj" in path else order
        assert found == wanted.tolist()


@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_calibration_chooses_by_what_it_sees_and_starts_anew(by):
    model, base = adapted("llama", f"s2ft(heads=1, channels=20, by={by})"), build("llama")
    disturb(model)
    seen: dict[str, torch.Tensor] = {}
    for path in positions(model):
        module = base.get_submodule(path)
        module.register_forward_hook(
            lambda m, args, y, path=path: seen.__setitem__(path, args[0].square().flatten(0, 1).mean(0).sqrt())
        )
    rewrite.calibrate(rewrite.attach(build("llama"), f"s2ft(heads=1, channels=20, by={by})"), [batch("llama")])
    fresh = rewrite.calibrate(adapted("llama", f"s2ft(heads=1, channels=20, by={by})"), [batch("llama")])
    base(**batch("llama")).loss.backward()
    assert_close(fresh(**batch("llama")).logits, base(**batch("llama")).logits, 1e-12)  # D = 0 again
    for path, found in positions(fresh).items():
        scores = seen[path] if by == "activation" else base.get_submodule(path).weight.grad.abs().sum(0)
        scores = scores.view(4, 16).sum(1) if "o_proj" in path else scores
        order = scores.argsort(descending=True)[: 1 if "o_proj" in path else 20].sort().values
        assert found == ((order[:, None] * 16 + torch.arange(16)).flatten() if "o_proj" in path else order).tolist()


@pytest.mark.parametrize("by", ["random", pytest.param("weight", marks=pytest.mark.slow)])
def test_on_a_quantised_base_the_update_is_added(by):
    spec = f"s2ft(heads=1, channels=20, by={by}) + nf4(base)"
    model = disturb(adapted("llama", spec, "aot_eager", num_hidden_layers=1))
    output, found = step(model, model, batch("llama"))
    assert fused(model) == 0
    with torch.compiler.set_stance("force_eager"):
        expected, wanted = step(model, model, batch("llama"))
    assert_close(output.logits, expected.logits)
    assert_same(found, wanted)


@pytest.mark.parametrize(
    "spec",
    [
        f"{SPEC} + lora(r=3)@attn,ffn",
        pytest.param(f"a: {SPEC} + b: s2ft(heads=2, channels=9, by=weight)", marks=pytest.mark.slow),
        pytest.param("s2ft(channels=999)", marks=pytest.mark.slow),
    ],
)
def test_beside_other_adapters(spec):
    model = disturb(adapted("llama", spec, "aot_eager", num_hidden_layers=1))
    output, found = step(model, model, batch("llama"))
    with torch.compiler.set_stance("force_eager"):
        expected, wanted = step(model, model, batch("llama"))
    assert_close(output.logits, expected.logits)
    assert_same(found, wanted)


def test_a_half_precision_base_adds_in_single_and_rounds_once():
    model = disturb(rewrite.compile(build("llama", torch.bfloat16, num_hidden_layers=1), SPEC, backend="aot_eager"))
    whole = rewrite.merge(copy.deepcopy(rewrite.attach(build("llama", torch.bfloat16, num_hidden_layers=1), SPEC)))
    with torch.no_grad():
        for g in require(model).grafts:
            module = whole.get_submodule(g.path)
            theta = [t.double() for t in adapter_of(model.get_submodule(g.path), g).operands()]
            module.weight.copy_(g.merged(module.weight.double(), None, *theta)[0])  # type: ignore[misc,operator,union-attr]
    given = batch("llama")
    difference = (model(**given).logits.float() - whole(**given).logits.float()).abs().max()
    assert difference <= 2 * torch.finfo(torch.bfloat16).eps * whole(**given).logits.float().abs().max()


def test_saved_loaded_and_removed(tmp_path):
    spec = "s2ft(heads=1, channels=20, by=weight)"
    model, before = build("llama"), frozen(build("llama"))
    disturb(rewrite.attach(model, spec))
    rewrite.save(model, tmp_path)
    other = build("llama", seed=0)
    with torch.no_grad():
        other.get_submodule("model.layers.0.mlp.down_proj").weight.add_(0)
    loaded = rewrite.load(other, tmp_path)
    assert torch.equal(loaded(**batch("llama")).logits, model(**batch("llama")).logits)
    rewrite.remove(model)
    assert changed(before, frozen(model)) == []
    assert attachment(model) is None
    assert not gradients(model)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("s2ft(heads=9)", "heads=9, and it has 4"),
        ("s2ft(heads=3)@attn.k", "heads=3, and it has 2"),
        ("s2ft(by=activation)@attn.q", "by=activation scores inputs, and output rows are trained"),
        ("s2ft(heads=0)", "must be at least 1"),
        ("s2ft(by=luck)", "random"),
    ],
)
def test_what_does_not_fit_says_why(spec, reason):
    with pytest.raises(rewrite.Error, match=reason):
        rewrite.plan(build("llama"), spec)


def test_a_fused_projection_is_adapted_by_its_parts():
    with pytest.raises(rewrite.ResolveError, match="name the parts"):
        rewrite.plan(build("gpt2"), "s2ft@attn.qkv")
    model = adapted("gpt2", "s2ft(heads=1)@attn.v")
    assert {p.shape for p in model.parameters() if p.requires_grad} == {(16, 64)}


def test_where_it_saves_nothing_the_plan_says_so():
    plan = rewrite.plan(build("llama"), "s2ft(heads=1, channels=20)@attn.q,ffn.up")
    assert "it saves no activation" in str(plan)
    assert "attn.q" not in str(rewrite.plan(build("llama"), SPEC))
    assert "added to the base product" in str(rewrite.plan(build("llama"), "s2ft(by=weight)"))
    assert rewrite.plan(build("llama"), SPEC).notes == ()


def test_the_run_is_a_function_of_the_seed_and_the_width_alone():
    runs = {S2ft(seed=s).run(16, 96, False) for s in range(40)}
    assert {r.stop for r in runs} == {16, 32, 48, 64, 80, 96}
    assert S2ft(seed=1).run(5, 7, False) == S2ft(seed=1).run(5, 7, False)
    assert S2ft(heads=2).run(6, 6, True).start == 0
