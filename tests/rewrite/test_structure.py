"""Roles from the graph alone: layouts that no library has, names that say nothing or lie, slices row by row."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import rewrite
from rewrite import inventory
from rewrite.sites import HINTS
from tests.models import assert_close, assert_same, changed, disturb, frozen, gradients
from tests.rewrite import layouts
from tests.rewrite.layouts import HEAD, HEADS, WIDTH, Stack

IDS = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MIXERS = [
    getattr(layouts, n) for n in ("Separate", "Lying", "Interleaved", "Strided", "Transposed", "Einsum", "Grouped")
]


@pytest.fixture(autouse=True)
def no_names(monkeypatch):
    """Without the table of names, so that nothing here rests on it."""
    for role in HINTS:
        monkeypatch.setitem(HINTS, role, re.compile(r"(?!)"))


def build(model: nn.Module) -> nn.Module:
    return model.double().eval()


def found(model: nn.Module, selector: str) -> list[str]:
    return [site.name for site in rewrite.plan(model, selector).sites]


def rows(model: nn.Module, selector: str) -> list[int]:
    site = rewrite.plan(model, f"{selector}[0]").sites[0]
    return list(range(site.out_features)) if site.rows is None else site.rows.indices()


def test_separate_projections_in_any_order():
    model = build(Stack(layouts.Separate))
    assert found(model, "attn.q") == ["items.0.m.two", "items.1.m.two"]
    assert found(model, "attn.k[0]") == ["items.0.m.one"]
    assert found(model, "attn.v[-1]") == ["items.1.m.three"]
    assert found(model, "attn.o[0]") == ["items.0.m.four"]
    assert found(model, "ffn.up[0]") == ["items.0.t.first"]
    assert found(model, "ffn.down[0]") == ["items.0.t.second"]
    assert found(model, "head") == ["final"]
    assert found(model, "embed") == ["table"]


@pytest.mark.parametrize(
    ("mix", "query", "value"),
    [
        (layouts.Interleaved, [h * 3 * HEAD + HEAD + i for h in range(HEADS) for i in range(HEAD)],
         [h * 3 * HEAD + i for h in range(HEADS) for i in range(HEAD)]),
        (layouts.Strided, list(range(0, 3 * WIDTH, 3)), list(range(2, 3 * WIDTH, 3))),
        (layouts.Transposed, list(range(WIDTH)), list(range(2 * WIDTH, 3 * WIDTH))),
        (layouts.Einsum, list(range(WIDTH)), list(range(2 * WIDTH, 3 * WIDTH))),
        (layouts.Grouped, list(range(WIDTH)), list(range(WIDTH + HEAD, WIDTH + 2 * HEAD))),
    ],
)  # fmt: skip
def test_rows_of_fused_projections(mix, query, value):
    model = build(Stack(mix))
    assert rows(model, "attn.q") == query
    assert rows(model, "attn.v") == value
    assert found(model, "attn.qkv[0]") == ["items.0.m.all"]


def test_rows_of_fused_gates():
    model = build(Stack(layouts.Separate, layouts.Gated))
    assert rows(model, "ffn.up") == list(range(0, 80, 2))
    assert rows(model, "ffn.gate") == list(range(1, 80, 2))
    assert found(model, "ffn.gate_up[0]") == ["items.0.t.both"]
    assert found(model, "ffn.down[0]") == ["items.0.t.last"]


def test_torchs_own_layers():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
    model = build(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert found(model, "attn.q[0]") == ["layers.0.self_attn.in_proj_weight[q]"]
    assert rows(model, "attn.k") == list(range(WIDTH, 2 * WIDTH))
    assert found(model, "attn.o[0]") == ["layers.0.self_attn.out_proj"]
    assert found(model, "ffn[0]") == ["layers.0.linear1", "layers.0.linear2"]


def test_cross_attention():
    model = build(layouts.Other())
    plan = rewrite.plan(model, "cross", inputs={"ids": IDS, "memory": MEMORY})
    assert [s.name for s in plan.sites] == ["qq", "kk", "vv"]
    assert {s.roles[0] for s in plan.sites} == {"cross.q", "cross.k", "cross.v"}


def test_a_forward_that_asks_for_values_is_run_once():
    model, batch = build(layouts.Other(reads_values=True)), {"ids": IDS, "memory": MEMORY}
    before, mode = frozen(model), model.training
    plan = rewrite.plan(model, "attn.q-cross", inputs=batch)
    assert [s.name for s in plan.sites] == ["items.0.m.two", "items.1.m.two"]
    assert not changed(before, frozen(model))
    assert model.training == mode


def test_experts():
    model = build(Stack(layouts.Separate, layouts.Experts))
    assert found(model, "ffn.experts.down[0]") == ["items.0.t.small"]
    assert found(model, "ffn.experts.gate[0]") == ["items.0.t.big[gate]"]
    assert rows(model, "ffn.experts.up") == list(range(20, 40))
    assert found(model, "router[0]") == ["items.0.t.pick"]
    assert not {"items.0.t.pick", "items.0.t.big"} & set(found(model, "linear"))


def test_names_that_lie_are_told(monkeypatch):
    monkeypatch.undo()
    model = build(Stack(layouts.Lying))
    plan = rewrite.plan(model, "lora(r=2)@attn.q")
    assert [p.site.name for p in plan.placements] == ["items.0.m.k_proj", "items.1.m.k_proj"]
    assert "items.0.m.q_proj is attn.k in the graph, whatever its name says" in str(plan)
    rewrite.attach(model, "lora(r=2)@attn.q")
    assert "items.0.m.q_proj is attn.k in the graph" in str(rewrite.explain(model))


def test_without_a_forward_names_decide_and_it_is_said(monkeypatch):
    monkeypatch.undo()
    model = build(Stack(layouts.Lying))
    monkeypatch.setattr(model, "forward", lambda *, nothing_of_the_kind: 1 / 0)
    plan = rewrite.plan(model, "lora(r=2)@attn.q")
    assert [p.site.name for p in plan.placements] == ["items.0.m.q_proj", "items.1.m.q_proj"]
    assert "no forward of this Stack could be recorded" in str(plan)


@pytest.mark.parametrize("mix", MIXERS)
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_an_adapter_moves_its_rows_alone(mix, role):
    """The derivative of the adapted weight by the adapter is zero outside of the rows, and nowhere else."""
    model = build(Stack(mix))
    base = copy.deepcopy(model)
    wanted = rows(model, f"attn.{role}")
    disturb(rewrite.attach(model, f"lora(r=2)@attn.{role}[0]"))
    adapted = model(IDS)
    rewrite.merge(model)
    assert_close(model(IDS), adapted)
    (name,) = changed(frozen(base), frozen(model))
    moved = (model.get_parameter(name) != base.get_parameter(name)).any(1)
    assert moved.nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("mix", MIXERS)
def test_compiled_equals_eager(mix):
    torch._dynamo.reset()
    model = build(Stack(mix, layouts.Gated))
    disturb(rewrite.compile(model, "lora(r=2)@attn.q,v,o,ffn.gate,down", backend="eager"))
    model.forward(IDS).square().sum().backward()
    eager = gradients(model)
    model(IDS).square().sum().backward()
    assert_same(gradients(model), eager)


def test_tied_head_read_by_a_function():
    model = build(layouts.TiedHead())
    before = frozen(model)
    sites = inventory.take(model).places
    assert [p.called for p in sites if p.path == "table"] == [False]
    disturb(rewrite.attach(model, "lora(r=2)@embed"))
    adapted = model(IDS)
    rewrite.merge(copied := copy.deepcopy(model))
    assert_close(copied(IDS), adapted)
    rewrite.remove(model)
    assert not changed(before, frozen(model))


def test_layers_of_stages_are_counted_through():
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                nn.ModuleList(layouts.Block(layouts.Separate, layouts.Plain) for _ in range(n)) for n in (1, 3, 2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                for item in part:  # pyright: ignore[reportGeneralTypeIssues]
                    x = item(x)
            return x

    model, x = build(Stages()), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plan = rewrite.plan(model, "attn.q[3:5]", inputs=(x,))
    assert [s.name for s in plan.sites] == ["parts.1.2.m.two", "parts.2.0.m.two"]


def test_the_model_is_not_touched():
    model = build(Stack())
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    state, random = frozen(model), torch.get_rng_state()
    rewrite.sites(model)
    assert not called
    assert not changed(state, frozen(model))
    assert torch.equal(random, torch.get_rng_state())
