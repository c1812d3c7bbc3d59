"""Grafts on weights: shared ones, stacks of them, and rows that lie apart; attached, merged, untied, removed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite import lower
from rewrite.codegen.maps import Rows
from rewrite.runtime.attach import adapter_state, attach
from rewrite.runtime.backend import rewrite_backend
from rewrite.runtime.captures import records_of
from tests.models import assert_close, assert_same, batch, build, changed, disturb, frozen, gradients, traces


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.embed, self.head = nn.Embedding(23, 9), nn.Linear(9, 23, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(9, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def tied() -> Tied:
    torch.manual_seed(3)
    return Tied().double()


IDS = torch.tensor([[1, 7, 22], [0, 7, 3]])


@pytest.mark.parametrize("spec", ["lora(r=3)@embed", "lora(r=3)@head", "lora(r=3)@linear,head,embed"])
def test_a_shared_weight_merges_untied(spec: str):
    model = disturb(rewrite.attach(tied(), spec))
    expected = model(IDS)
    with pytest.raises(rewrite.RewriteError, match=r"rewrite\.merge\(model, untie=True\)"):
        rewrite.merge(model)
    assert model.config.tie_word_embeddings
    assert torch.equal(model(IDS), expected)
    rewrite.merge(model, untie=True)
    assert_close(model(IDS), expected, 1e-12)
    assert model.head.weight is not model.embed.weight
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == ["embed.weight", "head.weight", "inner.weight", "inner.bias"]
    assert not model.config.tie_word_embeddings
    assert traces(model) == []
    base = tied()
    for name in ("embed", "head"):
        assert torch.equal(base.get_parameter("embed.weight"), model.get_parameter(f"{name}.weight")) == (
            name not in spec
        )


def test_nothing_shared_is_untied():
    model = disturb(rewrite.attach(tied(), "lora(r=3)@linear"))
    rewrite.merge(model, untie=True)
    assert model.head.weight is model.embed.weight
    assert model.config.tie_word_embeddings


def test_a_model_that_asks_whether_it_is_tied_is_not_untied():
    class Asks(Tied):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * (0.5 if self.config.tie_word_embeddings else 1.0)

    model = disturb(rewrite.attach(Asks().double(), "lora(r=3)@head"))
    before = frozen(model)
    with pytest.raises(rewrite.RewriteError, match="Asks computes something else when it is not"):
        rewrite.merge(model, untie=True)
    assert changed(before, frozen(model)) == []
    assert model.config.tie_word_embeddings


def for_all(model: nn.Module, spec: str) -> nn.Module:
    """`spec` attached to the weight itself, once for all modules that share it."""
    planned = rewrite.plan(model, spec)
    placements = [
        dataclasses.replace(p, site=dataclasses.replace(p.site, place=dataclasses.replace(p.site.place, called=False),
                                                        shared=True))
        for p in planned.placements
    ]  # fmt: skip
    planned = dataclasses.replace(planned, placements=tuple(placements))
    return attach(model, lower.grafts(planned), spec=planned.spec, sites=planned.rows())


@pytest.mark.parametrize("spec", ["lora(r=3)@embed", "lora(r=3)@head", "lora(r=3, init=pissa)@head"])
def test_one_adapter_for_all_that_share_a_weight(spec: str):
    model: Any = disturb(for_all(tied(), spec))
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 2
    assert torch.equal(model.head.weight + 0, model.embed.weight + 0)
    assert not torch.equal(model.head.weight + 0, tied().head.weight)
    twin, expected = copy.deepcopy(model), model(IDS)
    expected.square().sum().backward()
    assert len(gradients(model)) == 2
    base: Any = tied()
    for layer in (base.embed, base.head):
        layer.weight.data = (model.head.weight + 0).detach()
    assert_close(expected, base(IDS), 1e-12)

    rewrite.merge(model)
    assert_close(model(IDS), expected, 1e-12)
    assert model.head.weight is model.embed.weight
    assert traces(model) == []
    before = tied()
    rewrite.remove(twin)
    assert changed(frozen(before), frozen(twin)) == []
    assert twin.head.weight is twin.embed.weight
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert torch.equal(twin(IDS), before(IDS))


def test_one_adapter_for_all_is_saved_and_loaded(tmp_path: Path):
    model = disturb(for_all(tied(), "lora(r=3)@head"))
    saved = adapter_state(model)
    assert sorted(saved) == ["head.adapters.lora.A", "head.adapters.lora.B"]
    rewrite.save(model, tmp_path)
    other: Any = for_all(tied(), "lora(r=3)@head")
    rewrite.load(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_modules_that_share_nothing_are_not_adapted_as_one():
    model: Any = tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    graft = dataclasses.replace(lower.grafts(rewrite.plan(tied(), "lora@head"))[0], where="weight", sharers=("embed",))
    with pytest.raises(rewrite.RewriteError, match="head, embed do not share weight"):
        attach(model, [graft], spec="lora@head")
    assert traces(model) == []


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 13, 7)), nn.Parameter(torch.randn(3, 13, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.up.transpose(1, 2)) @ self.down


@pytest.mark.parametrize("storage", ["", ' + nf4("0")', ' + nf4("0", double_quant=true)'])
def test_a_stack_of_weights(storage: str):
    def net() -> Any:
        torch.manual_seed(4)
        return nn.Sequential(Stack()).double()

    model, x = net(), torch.randn(5, 7, dtype=torch.float64)
    rewrite.attach(model, 'lora(r=3)@"0"' + storage)
    base = model(x)
    if not storage:
        assert_close(base, net()(x), 1e-12)
    disturb(model)
    expected = model(x)
    assert not torch.allclose(expected, base)
    twin = copy.deepcopy(model)
    rewrite.merge(model)
    assert_close(model(x), expected, 1e-12)
    assert traces(model) == []
    rewrite.remove(twin)
    assert changed(frozen(net()), frozen(twin)) == []
    assert [n for n, _ in twin.named_parameters()] == ["0.up", "0.down"]


def test_rows_that_lie_apart_merge_alone():
    rows, spec = Rows(3, 1, 3, 4), "lora(r=2)@linear"
    model, x = nn.Sequential(nn.Linear(7, 12)).double(), torch.randn(5, 7, dtype=torch.float64)
    before, planned = frozen(model), rewrite.plan(model, spec)
    placed = planned.placements[0]
    parts = dataclasses.replace(placed, site=dataclasses.replace(placed.site, rows=rows))
    attach(model, [lower.lower(parts)], spec=spec)
    disturb(model)
    outside = sorted(set(range(12)) - set(rows.indices()))
    moved = (model(x) - torch.nn.functional.linear(x, before["0.weight"], before["0.bias"])).abs().amax(0)
    assert moved[outside].tolist() == [0.0] * 6
    assert (moved[rows.indices()] > 0).all()
    expected = model(x)
    rewrite.merge(model)
    assert_close(model(x), expected, 1e-12)
    assert torch.equal(model[0].weight[outside], before["0.weight"][outside])


def test_a_base_checkpoint_loads_under_an_adapter_on_the_weight():
    model: Any = for_all(tied(), "lora(r=3)@head")
    other = nn.init.normal_(torch.empty(23, 9, dtype=torch.float64))
    state = {"embed.weight": other, "head.weight": other}
    result = model.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(model.embed.weight + 0, other)  # B is zero


@pytest.mark.parametrize("rows", [Rows(1, 2, 5, 12), Rows(3, 1, 3, 4)], ids=str)
def test_rows_fuse_with_their_layer(rows: Rows):
    model, x = nn.Sequential(nn.Linear(7, 12)).double(), torch.randn(5, 7, dtype=torch.float64)
    planned = rewrite.plan(model, "lora(r=2)@linear")
    placed = planned.placements[0]
    parts = dataclasses.replace(placed, site=dataclasses.replace(placed.site, rows=rows))
    disturb(attach(model, [lower.lower(parts)], spec="lora(r=2)@linear"))
    expected = model(x)
    expected.square().sum().backward()
    wanted = gradients(model)
    y = torch.compile(model, backend=rewrite_backend, options={"backend": "eager"})(x)
    assert [edit.rule for record in records_of(model) for done in record.passes for edit in done.edits][
        -1
    ] == "fuse_branch"
    assert_close(y, expected, 1e-12)
    y.square().sum().backward()
    assert_same(gradients(model), wanted, 1e-12)


@pytest.mark.parametrize("site", ["head", "embed"])
def test_an_untied_model_saves_and_loads_both_weights(site: str, tmp_path: Path):
    model: Any = disturb(rewrite.attach(build("gpt2").eval(), f"lora(r=3)@{site}"))
    expected = model(**batch("gpt2")).logits
    rewrite.merge(model, untie=True)
    assert_close(model(**batch("gpt2")).logits, expected, 1e-12)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(loaded(**batch("gpt2")).logits, expected, 1e-12)


def test_one_adapter_for_both_uses_of_a_tied_weight():
    torch._dynamo.reset()
    model, inputs = build("gpt2"), batch("gpt2")
    base, expected = frozen(model), model(**inputs).loss
    rewrite.compile(model, "lora(r=4)@tied", backend="eager")
    assert_close(model.forward(**inputs).loss, expected)
    disturb(model)
    eager, slopes = model.forward(**inputs), None
    eager.loss.backward()
    slopes = gradients(model)
    model(**inputs).loss.backward()
    assert len(slopes) == 2
    assert_same(gradients(model), slopes)
    (record,) = records_of(model)
    assert "factor_embedding" in record.after
    assert "factor_linear" in record.after
    merged = rewrite.merge(copy.deepcopy(model))
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert_close(merged(**inputs).loss, eager.loss)
    rewrite.remove(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not changed(base, frozen(model))


def test_a_weight_adapted_for_both_and_for_one_is_not_parted():
    model = disturb(rewrite.attach(build("gpt2"), "lora(r=2)@tied,head"))
    before = model(**batch("gpt2")).loss
    for untie in (False, True):
        with pytest.raises(rewrite.RewriteError, match="Nothing was merged"):
            rewrite.merge(model, untie=untie)
    assert_close(model(**batch("gpt2")).loss, before)
