"""What the partitioned graphs keep: never a weight, never a cast of one, and what is kept is counted by storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from rewrite.passes.record import GraphRecord
from rewrite.runtime.captures import records_of


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 10)
        self.up, self.down = nn.Linear(10, 24), nn.Linear(24, 10, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


WEIGHT = 24 * 10  # numbers in either weight; no activation has as many


def train_once(
    spec: str, dtype: torch.dtype | None = None, backend: str = "aot_eager"
) -> tuple[nn.Module, GraphRecord]:
    model = rewrite.compile(Mlp(), spec, backend=backend, dynamic=False)
    ids = torch.arange(5)[None]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        model(ids).float().square().sum().backward()
    (record,) = records_of(model)
    return model, record


def sizes(record: GraphRecord) -> set[int]:
    """Numbers in every storage kept: a decoded weight may be kept flat, under another shape."""
    return {torch.Size(s["shape"]).numel() for s in record.counts["saved"]}


@pytest.mark.parametrize(
    "spec",
    [
        "lora(r=3)@linear",
        "lora(r=3)@linear + nf4(linear)",
        "lora(r=3)@linear + nf4(linear, double_quant=true)",
        "full(embed) + nf4(linear)",
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_no_weight_is_saved(spec, dtype):
    _, record = train_once(spec, dtype)
    assert record.counts["saved"]
    assert WEIGHT not in sizes(record)


def test_without_the_pass_the_partitioner_saves_them(monkeypatch):
    """The test above can fail: a decode that no rule fuses is saved as soon as nothing pins it."""
    from rewrite.passes import partition, pipeline
    from rewrite.passes.record import PassRecord

    monkeypatch.setattr(pipeline, "PIPELINE", pipeline.PIPELINE[:1])
    monkeypatch.setattr(pipeline.run, "__defaults__", (pipeline.PIPELINE,))
    _, pinned = train_once("full(embed) + nf4(linear)")
    assert WEIGHT not in sizes(pinned)
    assert next(p for p in pinned.passes if p.name == "pin_static").edits
    monkeypatch.setattr(partition.pin_static, "pin_static", lambda *_: PassRecord("nothing"))
    _, plain = train_once("full(embed) + nf4(linear)")
    assert WEIGHT in sizes(plain)


def test_counts_are_by_storage():
    _, record = train_once("lora(r=3)@linear")
    saved = {s["name"]: s for s in record.counts["saved"]}
    assert record.counts["saved_bytes"] == sum(s["bytes"] for s in saved.values())
    for entry in saved.values():
        assert entry["bytes"] == torch.Size(entry["shape"]).numel() * getattr(torch, entry["dtype"]).itemsize


def test_flops_of_the_joint_graph():
    _, record = train_once("lora(r=3)@linear")
    tokens, base, branch = 5, 10 * 24, 3 * (10 + 24)
    assert record.counts["forward_flops"] == 2 * tokens * 2 * (base + branch)
    # `up` reads a frozen embedding: nothing flows to its input. Per branch: dh, dB (rows x 3 each), dA (3 x columns).
    up = 2 * 24 * 3 + 3 * 10
    down = 2 * 10 * 3 + 3 * 24 + (base + 3 * 24)
    assert record.counts["backward_flops"] == 2 * tokens * (up + down)


def test_inductor_keeps_no_weight_either():
    _, record = train_once("lora(r=3)@linear + nf4(linear)", backend="inductor")
    if record.counts:  # a warm compile cache does not partition again
        assert WEIGHT not in sizes(record)
