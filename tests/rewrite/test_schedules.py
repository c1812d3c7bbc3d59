"""The methods that choose what trains: importance of layers (`ist`) and of tensors (`green`)."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import rewrite
from rewrite.runtime.attach import require
from rewrite.runtime.dry_run import dry_run
from tests.models import changed, frozen, llama, traces
from tests.runtime.test_regimes import Stack, active, batch, build, loss

SPEC = "lora(r=2)@linear-head + ist(active=2, every=3)"


def adapters_at_work(model: Stack) -> set[int]:
    return {int(n.split(".")[1]) for n, p in model.named_parameters() if p.requires_grad}


def stir(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) / 5)
    return model


def test_ist_trains_the_adapters_of_its_blocks():
    model, base = rewrite.attach(build(), SPEC), build()
    optimizer = rewrite.optimizer(model, torch.optim.AdamW, lr=0.05)
    seen = set()
    for step in range(12):
        now = adapters_at_work(model)
        assert len(now) == 2
        seen.add(frozenset(now))
        loss(model, step).backward()
        assert {int(n.split(".")[1]) for n, p in model.named_parameters() if p.grad is not None} == now
        optimizer.step()
        rewrite.step(model, optimizer, loss=lambda step=step: loss(model, step))
        assert all(p.requires_grad for p in optimizer.state)
        optimizer.zero_grad()
    assert len(seen) > 1
    assert not changed(frozen(rewrite.remove(model)), frozen(base))
    assert not traces(model)


def test_ist_moves_the_importance_as_its_formula_says():
    model = stir(rewrite.attach(build(), "lora(r=2)@linear-head + ist(active=1, every=1, trials=2, share=0.5)"))
    gates = [m.gate for m in model.modules() if hasattr(m, "gate")]
    assert len(gates) == 8
    runs = []

    def measured() -> torch.Tensor:
        turned = {n for n, layer in enumerate(model.layers) if layer.up.adapters.lora.gate != 1}
        assert all(g in (0.25, 1.0) for g in gates)
        assert not model.training
        assert not torch.is_grad_enabled()
        runs.append((turned, float(loss(model))))
        return loss(model)

    model.train()
    rewrite.step(model, loss=measured)
    assert model.training
    assert all(g == 1 for g in gates)
    assert [len(turned) for turned, _ in runs] == [2, 2]
    assert runs[0][0] != runs[1][0]
    expected = torch.zeros(4, dtype=torch.float64)
    mean = sum(math.exp(-value) for _, value in runs) / 2
    for turned, value in runs:
        for n in turned:
            s = torch.sigmoid(expected[n])
            expected[n] += 10 * (math.exp(-value) - mean) * s * (1 - s)
    (memory,) = require(model).memory.values()
    torch.testing.assert_close(memory["importance"], expected, rtol=0, atol=1e-12)


def test_an_adapter_turned_down_does_a_part_of_what_it_does():
    model = stir(rewrite.attach(build(), "lora(r=2)@linear-head + ist(active=4, every=1, scale=0.5, share=0.9)"))
    # share=0.9 of 4 blocks: three are turned down, by a factor on B
    values: list[tuple[set[int], float]] = []

    def measured() -> torch.Tensor:
        turned = {n for n, layer in enumerate(model.layers) if layer.up.adapters.lora.gate != 1}
        values.append((turned, float(loss(model))))
        return loss(model)

    rewrite.step(model, loss=measured)
    for turned, value in values:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for n in turned:
                for layer in (other.layers[n].up, other.layers[n].down):
                    layer.adapters.lora.B.mul_(0.5)
        assert float(loss(other).detach()) == pytest.approx(value, rel=1e-12)


def test_ist_prefers_blocks_that_are_missed():
    model = rewrite.attach(build(), "lora(r=2)@linear-head + ist(active=1, every=1, sets=none)")
    (memory,) = require(model).memory.values()
    memory["importance"].copy_(torch.tensor([4.0, 4.0, -4.0, 4.0]))
    found = []
    for _ in range(40):
        rewrite.step(model, loss=lambda: torch.zeros(()))
        found.append(*adapters_at_work(model))
    assert found.count(2) > 30


def test_ist_compiled_is_ist_in_eager():
    found = []
    for compiled in (False, True):
        model = build(3)
        torch.manual_seed(5)
        spec = "lora(r=2)@linear-head + ist(active=1, every=2)"
        made = rewrite.compile(model, spec, backend="aot_eager") if compiled else rewrite.attach(model, spec)
        optimizer = rewrite.optimizer(made, torch.optim.SGD, lr=0.05)
        for step in range(8):
            loss(made, step).backward()
            optimizer.step()
            rewrite.step(made, optimizer, loss=lambda made=made: loss(made))
            optimizer.zero_grad()
        found.append(torch.cat([p.flatten() for n, p in made.named_parameters() if "lora" in n]))
        assert require(made).calls.eager == 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ist(active=2)", r"it is about adapters: add lora\(r=8\)@linear-head"),
        ("full(norm) + ist", "it is about adapters"),
        ("lora@linear + ist(active=9)", "active=9 is more than its 2 blocks"),
        ("lora@linear + ist(active=1) + lisa(active=1)", "lisa says already what is at work"),
        ("green + mezo", "green looks at gradients after a step, and mezo has none|mezo"),
        ("green + fused_update", "fused_update has freed them by then"),
        ("green(every=2)", r"green\(every\) must be at least 4, got 2"),
    ],
)
def test_what_does_not_go_together(spec: str, message: str):
    with pytest.raises(rewrite.Error, match=message):
        rewrite.attach(llama(), spec)


def test_ist_says_that_it_wants_a_loss():
    model = rewrite.attach(build(), SPEC)
    rewrite.step(model)
    rewrite.step(model)
    with pytest.raises(rewrite.RewriteError, match=r"measures losses after this step: rewrite\.step\(model, optimizer"):
        rewrite.step(model)


IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
        rewrite.step(model, optimizer)


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_green_keeps_to_its_budget(rho):
    torch.manual_seed(0)
    model, base = llama(), llama()
    (full,) = dry_run(base, kwargs=BATCH)
    forward, backward = full.counts["forward_flops"], full.counts["backward_flops"]
    rewrite.attach(model, f"green(rho={rho})")
    optimizer = rewrite.optimizer(model, torch.optim.AdamW, lr=1e-3)
    steps(model, optimizer, 2)
    assert all(p.requires_grad for p in model.parameters())
    steps(model, optimizer, 2)
    chosen = {n for n, p in model.named_parameters() if p.requires_grad}
    (record,) = dry_run(model, kwargs=BATCH)
    share = (record.counts["forward_flops"] + record.counts["backward_flops"]) / (forward + backward)
    assert rho - 0.15 < share <= rho
    assert len(chosen) < len(list(model.parameters()))
    assert {id(p) for p in optimizer.state} == {id(p) for n, p in model.named_parameters() if n in chosen}
    before = frozen(model)
    steps(model, optimizer, 3)
    assert set(changed(before, frozen(model))) <= chosen


def test_green_weighs_tensors_by_gradient_times_update(monkeypatch):
    from rewrite.methods.green import Green

    seen = {}

    def selected(self: Green, importance: list[float], costs: object) -> list[int]:
        seen["importance"] = importance
        return list(range(len(importance)))

    monkeypatch.setattr(Green, "selected", selected)
    model = rewrite.attach(build(), "green")
    optimizer = rewrite.optimizer(model, torch.optim.Adam, lr=0.01)
    history, gradients = [frozen(model)], dict[str, torch.Tensor]()
    for number in range(3):
        optimizer.zero_grad()
        loss(model, number).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        history.append(frozen(model))
        rewrite.step(model, optimizer)
    names = [n for g in require(model).grafts for n in (f"{g.path}.{slot}" for slot in g.slots)]
    wanted = [-float((gradients[n] * (history[2][n] - history[1][n])).sum()) for n in names]
    assert seen["importance"] == pytest.approx(wanted, rel=1e-9)


def small(spec: str, count: int, rate: float = 0.01) -> list[set[str]]:
    """What is at work after each of some steps of a small model, in eager and compiled alike."""
    histories = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build(3)
        made = rewrite.compile(model, spec, backend="aot_eager") if compiled else rewrite.attach(model, spec)
        optimizer, history = rewrite.optimizer(stir(made), torch.optim.SGD, lr=rate), []
        for number in range(count):
            optimizer.zero_grad()
            loss(made, number).backward()
            optimizer.step()
            rewrite.step(made, optimizer)
            history.append({n for n, p in made.named_parameters() if p.requires_grad})
        histories.append(history)
        assert require(made).calls.eager == 0
        rewrite.remove(made)
        assert not traces(made)
    assert histories[0] == histories[1]
    return histories[0]


def test_green_selects_anew():
    history = small("green(rho=0.5, every=5)", 10)
    whole = [len(works) == len(list(build(3).parameters())) for works in history]
    assert whole == [True, True, False, False, True, True, True, False, False, True]


def test_green_over_adapters():
    *_, works = small("lora(r=2)@linear + green(rho=0.6)", 4)
    assert 0 < len(works) < 14
    assert all("lora" in n for n in works)


def test_a_choice_reaches_every_block():
    for count, size, sets in itertools.product((3, 5, 8), (1, 2, 3), (1, 4, None)):
        model = build(count)
        rewrite.attach(model, f"lisa(active={size}, every=1, sets={'none' if sets is None else sets})")
        seen = {n for _ in range(60) if rewrite.step(model) for n in active(model)}
        assert seen == set(range(count))
    assert batch().shape == (3, 4)
