"""What rests and what works: frozen tensors, gradients, optimizer state, compiled graphs, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rewrite
from rewrite.runtime.attach import require
from tests.models import assert_close, changed, frozen, llama, t5

IDS = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks between an embedding and a head; compiles in a moment."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block(6, 9) for _ in range(blocks))
        self.head = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(blocks: int = 4) -> Stack:
    torch.manual_seed(3)
    return Stack(blocks).double()


def batch(number: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(number))


def loss(model: nn.Module, number: int = 0) -> torch.Tensor:
    return (model(batch(number)) - 1).square().mean()


def active(model: Stack) -> tuple[int, ...]:
    return tuple(n for n, layer in enumerate(model.layers) if next(layer.parameters()).requires_grad)


def test_blocks_are_sites():
    found = rewrite.plan(llama(num_hidden_layers=3), "blocks[1:]")
    assert [s.name for s in found.sites] == ["model.layers.1", "model.layers.2"]
    model = t5(num_layers=1)
    assert [s.path for s in rewrite.plan(model, "dec.blocks").sites] == ["decoder.block.0"]
    with pytest.raises(rewrite.ResolveError, match="lora cannot stand at 'blocks'"):
        rewrite.plan(model, "lora@blocks")


def test_lisa_trains_its_blocks_and_what_is_in_none():
    model, base = build(), build()
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(rewrite.attach(model, "lisa(active=2, every=3)"), lr=0.01))
    seen = set()
    for step in range(12):
        now, before = active(model), frozen(model)
        assert len(now) == 2
        seen.add(now)
        loss(model, step).backward()
        reference = copy.deepcopy(model).requires_grad_(True)
        reference.zero_grad()
        loss(reference, step).backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            works = name.startswith(("embed", "head")) or int(name.split(".")[1]) in now
            assert (p.grad is not None) == works
            assert not works or torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        optimizer.step()
        moved = changed(before, frozen(model))
        assert {n.split(".")[1] for n in moved if n.startswith("layers")} == {str(n) for n in now}
        assert rewrite.step(model, optimizer) == step + 1
        assert all(p.requires_grad for p in optimizer.state)
        optimizer.zero_grad()
    assert len(seen) > 1
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert changed(frozen(model), frozen(base))
    rewrite.remove(model)
    assert not changed(frozen(model), frozen(base))
    assert all(p.requires_grad for p in model.parameters())


def test_originals_are_kept_when_a_block_first_works():
    model = rewrite.attach(build(), "lisa(active=1, every=1)@blocks")
    originals, (first,) = require(model).originals, active(model)
    kept = {n for n, _ in model.named_parameters() if n in originals}
    assert {n.split(".")[1] for n in kept if n.startswith("layers")} == {str(first)}
    while len({*active(model), first}) < 2:
        rewrite.step(model)
    (second,) = active(model)
    assert f"layers.{second}.up.weight" in originals
    rest = {0, 1, 2, 3} - {first, second}
    assert not any(f"layers.{n}.up.weight" in originals for n in rest)


def test_blocks_that_are_not_named_stay_frozen():
    model = rewrite.attach(build(), "lisa(active=1, every=1)@blocks[2:]")
    for _ in range(8):
        assert active(model) in {(2,), (3,)}
        rewrite.step(model)
    assert len(rewrite.parameter_groups(model, lr=1.0)[0]["params"]) == 3 + 2 * 3


def test_draws_follow_the_seed_and_reach_every_block():
    def history(seed: int) -> list[tuple[int, ...]]:
        model = build(7)
        torch.manual_seed(seed)
        rewrite.attach(model, "lisa(active=3, every=1, sets=4)")
        return [active(model) for _ in range(40) if rewrite.step(model)]

    assert history(1) == history(1) != history(2)
    assert {n for chosen in history(1) for n in chosen} == set(range(7))
    assert len(set(history(1))) <= 4
    free = build(7)
    rewrite.attach(free, "lisa(active=3, every=1, sets=none)")
    assert len({active(free) for _ in range(60) if rewrite.step(free)}) > 12


def test_lisa_over_adapters_rests_them_by_block():
    model = rewrite.attach(build(), "lora(r=2)@linear + lisa(active=1, every=1)")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    for _ in range(5):
        works = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and n.startswith("layers")}
        assert len(works) == 1
        assert model.head.adapters.lora.A.requires_grad  # in no block
        rewrite.step(model)


def test_a_tensor_that_blocks_share_is_always_at_work():
    model = rewrite.attach(build(), "vblora(length=3, vectors=8)@linear-head + lisa(active=1)")
    bank = next(p for n, p in model.named_parameters() if n.endswith(".bank"))
    for _ in range(4):
        assert bank.requires_grad
        named = [n for n, p in model.named_parameters() if p.requires_grad and p is not bank]
        assert len({n.split(".")[1] for n in named}) == 1
        rewrite.step(model)


def test_one_graph_for_each_set_of_blocks():
    model = rewrite.compile(build(3), "lisa(active=1, every=1, sets=3)", backend="aot_eager")
    optimizer = torch.optim.SGD(rewrite.parameter_groups(model, lr=0.01))
    counters.clear()
    for _ in range(16):
        loss(model).backward()
        with torch.no_grad():
            loss(model)
        optimizer.step()
        rewrite.step(model, optimizer)
        optimizer.zero_grad()
        assert counters["stats"]["unique_graphs"] <= 2 * 3
    assert counters["stats"]["unique_graphs"] == 2 * 3  # each block once in training, once in evaluation
    assert require(model).calls.eager == 0


def test_there_is_room_for_more_graphs_than_dynamo_allows(monkeypatch):
    monkeypatch.setattr("rewrite.runtime.compiled._RECOMPILES", 0)
    blocks = 10
    model = rewrite.compile(build(blocks), "lisa(active=1, every=1)", backend="eager")
    for step in range(50):
        assert_close(model(batch(step)), model.forward(batch(step)))
        rewrite.step(model)
    assert len({active(model) for _ in range(200) if rewrite.step(model)}) == blocks
    assert require(model).calls.eager == 0
    assert len(require(model).memory["lisa(active=1, every=1)@blocks"]["pool"]) == blocks


def test_lisa_on_a_language_model_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    base = llama(num_hidden_layers=3)
    model = copy.deepcopy(base)
    rewrite.attach(model, "lisa(active=1, every=2)")
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=1e-2))
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        rewrite.step(model, optimizer)
        optimizer.zero_grad()
    rewrite.save(model, tmp_path)
    loaded = rewrite.load(copy.deepcopy(base), tmp_path)
    assert not changed(frozen(model), frozen(loaded))
    merged = rewrite.merge(copy.deepcopy(model))
    assert torch.equal(merged(IDS).logits, model(IDS).logits)
    assert not changed(frozen(rewrite.remove(loaded)), frozen(base))
    assert not changed(frozen(rewrite.remove(model)), frozen(base))


def test_a_copy_goes_its_own_way():
    model = rewrite.attach(build(), "lisa(active=1, every=1)")
    other = copy.deepcopy(model)
    for _ in range(6):
        rewrite.step(other)
    assert require(model).steps == 0
    assert len(active(model)) == 1
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    rewrite.remove(model)
    assert not changed(frozen(model), frozen(build()))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lisa(active=5)", "active=5 is more than its 4 blocks"),
        ("lisa + lisa(active=1)", "lisa is there twice"),
        ("mezo + fused_update", "fused_update says already how gradients are made and used"),
        ("adalora@linear + mezo", "adalora looks at gradients after a step, and mezo has none"),
        ("adalora@linear + fused_update", "adalora looks at gradients after a step, and fused_update has freed them"),
        ("lisa@linear", "lisa cannot stand at 'linear'"),
        ("mezo@linear", "mezo is about the whole model, not about sites"),
    ],
)
def test_what_does_not_go_together(spec: str, message: str):
    model = build()
    with pytest.raises(rewrite.Error, match=message):
        rewrite.attach(model, spec)
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_that_lacks_a_tensor_is_refused():
    model = rewrite.attach(build(), "lisa(active=1, every=1)")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(rewrite.RewriteError, match=r"the optimizer does not hold it: make it with rewrite\.optimizer"):
        any(not rewrite.step(model, optimizer) for _ in range(20))


def test_what_is_stored_does_not_train():
    model = rewrite.attach(llama(num_hidden_layers=2), "nf4(base) + lisa(active=1)")
    works = {n for n, p in model.named_parameters() if p.requires_grad}
    outside = {n.removesuffix(".weight") for n in works if "layers" not in n}
    assert outside == {"model.embed_tokens", "model.norm", "lm_head"}
    assert all("norm" in n for n in works if "layers" in n)
    assert "lisa trains all of the model but for the 14 stored weights" in str(
        rewrite.plan(llama(num_hidden_layers=2), "nf4(base) + lisa(active=1)")
    )


def test_explain_says_what_is_at_work():
    model = rewrite.compile(build(), "lora(r=2)@linear + lisa(active=1) + fused_update", backend="eager")
    text = rewrite.explain(model)
    assert "lisa(active=1)@blocks: 6 of 18 tensors at work" in text
    assert "fused_update: fused gradients; a compiled backward hands over those of its graph together" in text
