"""Sparse updates: where their entries stand, how they move, and what an optimizer forgets of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rewrite
from rewrite.methods.lift import Lift
from rewrite.places import largest, low_rank
from rewrite.runtime.attach import adapter_of, require
from tests.models import assert_close, batch, build, disturb, traces

SITE = "model.layers.0.mlp.down_proj"
WORD = "@ffn.down"


def adapted(spec: str, **changes: Any) -> nn.Module:
    return rewrite.attach(build("llama", num_hidden_layers=1, **changes), spec + WORD)


def held(model: nn.Module) -> dict[str, Tensor]:
    (graft,) = require(model).grafts
    return adapter_of(model.get_submodule(graft.path), graft).tensors()


def entries(at: Tensor) -> set[tuple[int, int]]:
    return {(i, j) for i, j in at.t().tolist()}


def weight(model: nn.Module) -> Tensor:
    return model.get_submodule(SITE).weight.detach()  # type: ignore[union-attr,operator,return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        model(**batch("llama", seed=number)).loss.backward()
        optimizer.step()
        rewrite.step(model, optimizer)


def test_largest_entries_row_by_row():
    scores = torch.tensor([[1.0, 9.0, 3.0], [8.0, 2.0, 7.0]])
    assert largest(scores, 3).tolist() == [[0, 1, 1], [1, 0, 2]]
    assert largest(torch.stack([scores, torch.tensor([[9.0, 0, 0], [0, 0, 0]])]), 2).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("shape", [(9, 7), (60, 80), (530, 600)])
def test_low_rank_approximation(shape):
    W = torch.randn(*shape, dtype=torch.float64) @ torch.diag(0.7 ** torch.arange(shape[1], dtype=torch.float64))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    error = torch.linalg.norm(low_rank(W, 3) - best) / torch.linalg.norm(best)
    assert error < (1e-12 if min(shape) <= 512 else 1e-2)
    assert torch.equal(low_rank(W, 3), low_rank(W, 3))
    assert low_rank(W, min(shape)) is W


# --- shira ---


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_shira_takes_the_largest_gradients(mask):
    model, base = adapted(f"shira(r=1, mask={mask})"), build("llama", num_hidden_layers=1)
    assert entries(held(model)["at"]) == entries(largest(weight(base).abs(), 160))
    disturb(model)
    rewrite.calibrate(model, [batch("llama"), batch("llama", seed=5)])
    for seed in (1, 5):
        base(**batch("llama", seed=seed)).loss.backward()
    clean = rewrite.calibrate(adapted(f"shira(r=1, mask={mask})"), [batch("llama"), batch("llama", seed=5)])
    grad = base.get_parameter(f"{SITE}.weight").grad
    assert grad is not None
    scores = grad * weight(base) if mask == "snip" else grad
    assert entries(held(clean)["at"]) == entries(largest(scores.abs(), 160))
    assert not held(model)["v"].any()
    assert_close(clean(**batch("llama")).logits, build("llama", num_hidden_layers=1)(**batch("llama")).logits, 1e-12)


# --- spiel ---


def spiel(**arguments: Any) -> nn.Module:
    text = ", ".join(f"{k}={v}" for k, v in {"density": 0.01, "every": 3, "steps": 30, "seed": 0, **arguments}.items())
    return adapted(f"spiel({text})")


def test_spiel_moves_everything_first_and_then_a_falling_share_to_where_the_gradient_is():
    model = spiel(drop=0.5)
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=1e-2))
    seen = []
    for number in range(1, 16):
        before = {n: t.clone() for n, t in held(model).items()}
        train(model, optimizer, 1)
        after = held(model)
        moved = int((before["at"] != after["at"]).any(0).sum())
        assert len(entries(after["at"])) == after["at"].shape[1]
        if number % 3:
            assert moved == 0
            continue
        seen.append(moved)
        gone = after["v"] == 0
        state = optimizer.state[next(p for p in model.parameters() if p.requires_grad)]
        assert not state["exp_avg"][gone].any()
        assert not state["exp_avg_sq"][gone].any()
        assert state["exp_avg_sq"][~gone].all()
        kept = (before["at"] == after["at"]).all(0)
        scores = torch.outer(after["rows"], after["columns"])
        taken = entries(after["at"][:, kept & ~gone])
        for i, j in taken:
            scores[i, j] = -1
        best = scores.flatten().topk(int(gone.sum())).values
        found = scores[after["at"][0][gone].long(), after["at"][1][gone].long()]
        assert_close(found.sort().values, best.sort().values, 1e-12)
    shares = [1.0, *(0.5 * (1 - t / 30) for t in (6, 9, 12, 15))]
    count = held(model)["v"].numel()
    assert [n >= 0.6 * int(s * count) and n <= int(s * count) for n, s in zip(seen, shares, strict=True)] == [True] * 5


def test_spiel_accumulates_as_sm3():
    model = spiel(every=100)
    rows, columns = torch.zeros(64, dtype=torch.float64), torch.zeros(96, dtype=torch.float64)
    at = held(model)["at"].long()
    for seed in range(3):
        model.zero_grad()
        model(**batch("llama", seed=seed)).loss.backward()
        rewrite.step(model)
        grad = next(p for p in model.parameters() if p.requires_grad).grad
        assert grad is not None
        had = [min(rows[i], columns[j]) + g**2 for i, j, g in zip(*at.tolist(), grad, strict=True)]
        for i, j, n in zip(*at.tolist(), had, strict=True):
            rows[i], columns[j] = max(rows[i], n), max(columns[j], n)
    assert_close(held(model)["rows"], rows, 1e-12)
    assert_close(held(model)["columns"], columns, 1e-12)


def test_a_move_compiles_nothing_anew():
    model = build("llama", num_hidden_layers=1)
    rewrite.compile(model, f"spiel(density=0.01, every=1, seed=0){WORD}", backend="aot_eager")
    optimizer = torch.optim.SGD(rewrite.parameter_groups(model, lr=0.1))
    train(model, optimizer, 1)
    at = held(model)["at"].clone()
    counters.clear()
    train(model, optimizer, 3)
    assert not counters["stats"]
    assert not torch.equal(at, held(model)["at"])
    with torch.compiler.set_stance("force_eager"):
        expected = model(**batch("llama")).logits
    assert_close(model(**batch("llama")).logits, expected)


# --- lift ---


def test_lift_trains_the_largest_entries_of_the_approximation():
    model = adapted("lift(r=1, rank=4)")
    W = weight(model)
    U, S, Vh = torch.linalg.svd(W)
    scores = ((U[:, :4] * S[:4]) @ Vh[:4]).abs()
    assert held(model)["active"].all()
    assert entries(held(model)["at"]) == entries(largest(scores, 160))


def test_lift_chooses_anew_and_what_rests_keeps_its_value():
    model = adapted("lift(r=1, rank=60, every=2, spare=0.5)")
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=0.03, weight_decay=0.1))
    rested: dict[tuple[int, int], float] = {}
    changes = 0
    for number in range(1, 9):
        before = {n: t.clone() for n, t in held(model).items()}
        train(model, optimizer, 1)
        now = held(model)
        assert len(entries(now["at"])) == 240
        if number % 2 == 0:
            merged = weight(model).clone().index_put_(tuple(before["at"].long()), now["v"], accumulate=True)
            wanted = entries(largest(low_rank(merged, 60).abs(), 160))
            active = entries(now["at"][:, now["active"]])
            room = int((~now["active"] & (now["v"] == 0)).sum())
            assert active <= wanted
            assert active == wanted or room == 0
            changed = before["active"] != now["active"]
            changes += int(changed.sum())
            state = optimizer.state[next(p for p in model.parameters() if p.requires_grad)]
            assert not state["exp_avg"][changed].any()
        values = dict(zip([tuple(e) for e in now["at"].t().tolist()], now["v"].tolist(), strict=True))
        resting = {tuple(e) for e in now["at"][:, ~now["active"] & (now["v"] != 0)].t().tolist()}
        for place in rested.keys() & resting:
            assert values[place] == rested[place]
        rested = {place: values[place] for place in resting}
    assert changes
    assert rested


def test_lift_activates_within_its_room():
    at = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.int32)
    v, active = torch.tensor([0.5, 0.25, 0.0, 0.0]), torch.tensor([True, True, False, False])
    changed = Lift().activate(torch.tensor([1, 5, 7, 9]), 4, v, at, active)  # (0, 1), (1, 1), (1, 3), (2, 1)
    assert changed.tolist() == [True, False, True, True]
    assert active.tolist() == [False, True, True, True]
    assert entries(at) == {(0, 0), (0, 1), (1, 1), (1, 3)}
    assert v.tolist() == [0.5, 0.25, 0.0, 0.0]


def test_lift_chooses_from_a_quantised_base_and_from_a_weight_that_is_not_called():
    for spec in ("lift(r=1, rank=4, every=1)@attn.q + nf4(base)", 'lift(r=1, rank=4, every=1)@"layer"'):
        model = build("llama", num_hidden_layers=1) if "nf4" in spec else nn.TransformerEncoderLayer(8, 2, 12)
        model = rewrite.attach(model, spec.replace('"layer"', '"self_attn"') if "nf4" not in spec else spec)
        (graft, *_) = (g for g in require(model).grafts if g.where != "storage")
        theta = adapter_of(model.get_submodule(graft.path), graft).tensors()
        with torch.no_grad():
            theta["v"].add_(theta["active"] * 0.5)
        plain = rewrite.merge(__import__("copy").deepcopy(model))
        W = graft.view(plain.get_parameter(f"{graft.path}.{graft.tensor}").detach())
        rewrite.step(model)
        assert entries(theta["at"][:, theta["active"]]) <= entries(largest(low_rank(W, 4).abs(), int(sum(W.shape))))


# --- sara ---


def test_sara_trains_what_is_below_its_threshold():
    model = adapted("sara(theta=2e-3, share=0.2, refresh=2)")
    W, now = weight(build("llama", num_hidden_layers=1)), held(model)
    assert entries(now["at"][:, now["active"]]) == {tuple(e) for e in (W.abs() < 2e-3).nonzero().tolist()}
    few = held(adapted("sara(theta=1, share=0.01)"))
    assert few["active"].all()
    assert entries(few["at"]) == entries(largest(-W.abs(), int(0.01 * W.numel())))


def test_sara_without_a_threshold_trains_its_share_and_refuses_one_that_nothing_is_below():
    now = held(adapted("sara(share=0.02)"))
    assert now["active"].all()
    assert now["v"].numel() == int(0.02 * 64 * 96)
    model = build("llama", num_hidden_layers=1)
    with pytest.raises(rewrite.RewriteError, match="no entry of a weight is below it, the smallest is"):
        rewrite.attach(model, "sara(theta=1e-12)@ffn.down")
    assert traces(model) == []


def test_sara_chooses_again_once_and_starts_anew():
    model = adapted("sara(theta=2e-3, share=0.2, refresh=2)")
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=1e-3))
    train(model, optimizer, 1)
    active, state = (
        held(model)["active"].clone(),
        optimizer.state[next(p for p in model.parameters() if p.requires_grad)],
    )
    assert state["exp_avg"].any()
    train(model, optimizer, 1)
    now, W = held(model), weight(build("llama", num_hidden_layers=1))
    at = now["at"].long()
    assert torch.equal(now["active"], active & ((W[at[0], at[1]] + now["v"]).abs() < 2e-3))
    assert 0 < now["active"].sum() < active.sum()
    assert not state["exp_avg"].any()
    values = now["v"].detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(held(model)["v"][~now["active"]], values[~now["active"]])
    assert not torch.equal(held(model)["v"], values)
