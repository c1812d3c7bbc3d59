"""report: bytes against the real tensors, gradients and AdamW; counts of captured graphs; units."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.attach import require
from rewrite.runtime.captures import records_of
from rewrite.runtime.holdings import holdings
from rewrite.table import duration, flops, share, size, table
from tests.rewrite.decoder import IDS, SPEC, Decoder, compiled
from tests.rewrite.test_explain import stable


@pytest.fixture(scope="module")
def counted() -> nn.Module:
    return compiled(backend="aot_eager")


def count(tensors) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def line(report, what: str):
    (found,) = [m for m in report.memory if m.what == what]
    return found


def test_text_of_memory(golden: Callable[..., None]):
    golden(stable(str(rewrite.report(rewrite.attach(Decoder(), SPEC)))))


@pytest.mark.parametrize(
    "spec", [SPEC, "lora(r=4, init=pissa)@linear", "full(norm, head)", "nf4(base, double_quant=true)"]
)
def test_bytes_are_those_of_the_tensors(spec: str):
    model = rewrite.attach(Decoder().bfloat16(), spec)
    report = rewrite.report(model)
    held = sum(m.bytes for m in report.memory if m.what not in ("gradients", "AdamW state"))
    assert held == count([*model.parameters(), *model.buffers()])
    assert report.parameters == sum(p.numel() for p in Decoder().parameters())
    assert report.trainable == rewrite.plan(Decoder(), spec).trainable


def test_gradients_and_optimizer_are_those_of_adamw():
    model = rewrite.attach(Decoder(), SPEC)
    report = rewrite.report(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(IDS).square().mean().backward()
    optimizer.step()
    assert line(report, "gradients").bytes == count(p.grad for p in model.parameters() if p.grad is not None)
    state = [t for p in trained for t in optimizer.state[p].values()]
    assert line(report, "AdamW state").bytes == count(state)


def test_tied_tensors_count_once():
    model = Decoder()
    model.lm_head.weight = model.embed.weight
    assert sum(h.parameters for h in holdings(model)) == sum(p.numel() for p in model.parameters())


def test_meta_models_count_alike():
    with torch.device("meta"):
        model = Decoder()
    assert rewrite.report(model).memory == rewrite.report(Decoder()).memory


def test_saved_bytes_are_those_of_the_partition(counted: nn.Module):
    report = rewrite.report(counted)
    (record,) = [r for r in records_of(counted) if r.training]
    (graph,) = report.graphs
    assert graph.saved is not None
    assert graph.saved_bytes == record.counts["saved_bytes"] > 0
    assert sum(s.count for s in graph.saved) == len(record.counts["saved"])
    assert [s.bytes for s in graph.saved] == sorted((s.bytes for s in graph.saved), reverse=True)
    assert report.bytes == sum(m.bytes for m in report.memory) + graph.saved_bytes
    assert not [s for s in graph.saved if "adapters" in s.where or "parametrizations" in s.where]


def test_operations_of_the_forward(counted: nn.Module):
    (graph,) = rewrite.report(counted).graphs
    tokens, layers = IDS.numel(), 2
    weights = sum(p.numel() for n, p in Decoder().named_parameters() if "norm" not in n and "embed" not in n)
    adapters = layers * 4 * ((64 + 64) + (64 + 32))
    assert graph.forward_flops is not None
    products = 2 * tokens * (weights + adapters)
    # Beside the products there is attention: scores and values, 2 products of tokens x length x width per layer.
    assert graph.forward_flops - products in (0, layers * 2 * 2 * tokens * IDS.shape[1] * 64)


def test_text_shows_ten_and_the_rest(counted: nn.Module):
    text = str(rewrite.report(counted))
    (graph,) = rewrite.report(counted).graphs
    assert graph.saved is not None
    shown = text.split("saved at")[1].splitlines()[2:]
    assert len(shown) == min(len(graph.saved), 11)
    assert ("the rest" in text) is (len(graph.saved) > 10)
    assert size(graph.saved_bytes) in text
    assert flops(graph.forward_flops or 0) in text


def test_graphs_that_were_not_counted_say_why(monkeypatch: pytest.MonkeyPatch):
    model = compiled("lora(r=4)@attn.q")
    assert "not counted: backend eager" in str(rewrite.report(model))
    assert "saved for backward" not in str(rewrite.report(model))
    monkeypatch.setattr(require(model), "backend", "inductor")
    assert "not counted: its compiled code came from the compile cache" in str(rewrite.report(model))
    assert json.loads(rewrite.report(model).to_json())["graphs"][0]["saved_bytes"] is None


def test_plain_model():
    report = rewrite.report(nn.Linear(3, 2))
    assert report.parameters == report.trainable == 8
    assert [(m.what, m.bytes) for m in report.memory] == [
        ("base, dense", 32),
        ("gradients", 32),
        ("AdamW state", 2 * 32 + 2 * 4),
    ]
    assert "nothing is attached" in str(report)


def test_model_without_parameters():
    report = rewrite.report(nn.ReLU())
    assert report.bytes == 0
    assert "0 trainable (0.000% of 0)" in str(report)


def test_json(counted: nn.Module):
    report = rewrite.report(counted)
    data = json.loads(report.to_json())
    assert data["bytes"] == report.bytes
    assert [m["bytes"] for m in data["memory"]] == [m.bytes for m in report.memory]
    assert data["graphs"][0]["saved_bytes"] == report.graphs[0].saved_bytes
    assert data["graphs"][0]["forward_flops"] == report.graphs[0].forward_flops


def test_picture(counted: nn.Module, tmp_path: Path):
    file = rewrite.report(counted).to_png(tmp_path / "new" / "memory.png")
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
    with pytest.raises(rewrite.RewriteError, match="cannot write the picture"):
        rewrite.report(counted).to_png(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1.00 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (99.95 * 2**20, "100 MiB"),
        (13.55 * 2**30, "13.6 GiB"),
        (5 * 2**60, "5,120 PiB"),
    ],
)
def test_bytes_have_three_digits(count: float, text: str):
    assert size(count) == text


def test_other_units():
    assert [flops(n) for n in (0, 7, 2_506_752, 4.2e15)] == ["0 FLOP", "7.00 FLOP", "2.51 MFLOP", "4.20 PFLOP"]
    assert [duration(t) for t in (0, 3e-5, 0.0441, 0.9999, 75)] == ["0 ms", "0.0300 ms", "44.1 ms", "1.00 s", "75.0 s"]
    assert share(1_792, 74_560) == "2.403%"


def test_table_aligns():
    assert table([("a", "n"), ("bcd", "1"), ("e", "1,000")], right={1}) == [
        "a        n",
        "---  -----",
        "bcd      1",
        "e    1,000",
    ]
