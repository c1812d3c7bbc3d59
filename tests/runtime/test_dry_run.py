"""Steps that are counted, not run: equal to what eager autograd keeps, to a deep model's own count, and to hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime import captures
from rewrite.runtime.compiled import compile_model
from rewrite.runtime.dry_run import dry_run, without_numbers
from rewrite.runtime.scaling import Run, counted, runs_of
from tests.models import build
from tests.runtime.test_memory import kept

WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def llama(layers: int, dtype: torch.dtype = torch.float32, spec: str = "", device: str = "cpu") -> nn.Module:
    with torch.device(device):
        model = build("llama", dtype, num_hidden_layers=layers, **WIDE)
    model.requires_grad_(not spec)
    return (rewrite.attach(model, spec) if spec else model).train()


def ids(rows: int = 4, tokens: int = 96) -> dict[str, Any]:
    found = torch.randint(0, 100, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "labels": found, "use_cache": False}


@pytest.mark.parametrize(
    ("spec", "dtype"), [("", torch.float32), ("", torch.bfloat16), ("lora(r=8)@linear", torch.float32)]
)
def test_the_default_partition_keeps_what_eager_autograd_keeps(spec: str, dtype: torch.dtype):
    model = llama(6, dtype, spec)
    eager = sum(t.untyped_storage().nbytes() for t in kept(model, ids()).values())
    (record,) = dry_run(model, kwargs=ids())
    default = sum(s["bytes"] for s in record.counts["default_saved"])
    assert default == pytest.approx(eager, rel=1e-3)
    assert record.counts["saved_bytes"] < default


def test_a_real_step_through_inductor_keeps_the_same():
    model = llama(1, spec="lora(r=4)@attn.q")
    (record,) = dry_run(model, kwargs=ids())
    compile_model(model, "inductor", False)
    model(**ids())
    (real,) = captures.records_of(model)
    if real.counts:  # a warm compile cache does not partition again
        assert real.counts["saved_bytes"] == record.counts["saved_bytes"]
        assert real.counts["forward_flops"] == record.counts["forward_flops"]


def test_the_model_stays_as_it_is():
    model = llama(2, spec="lora(r=4)@attn.q + nf4(base)")
    before = {name: (p, p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}
    dry_run(model, kwargs=ids())
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is p and torch.equal(p.detach(), value) for name, (p, value) in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_without_numbers_keeps_what_is_shared():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5)})
    model["b"].weight = model["a"].weight
    bare = without_numbers(model)
    assert bare["b"].weight is bare["a"].weight
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert isinstance(bare["a"].bias, nn.Parameter)


@pytest.mark.parametrize("spec", ["lora(r=4)@linear", "lora(r=4)@attn.q[-5:],v[-5:] + nf4(base)", "full(norm)"])
def test_alike_blocks_are_counted_as_if_they_were_run(spec: str):
    model = llama(7, torch.bfloat16, spec, device="meta")
    whole = counted(model, (), ids(), ())
    short = counted(model, (), ids(), ("model.layers",))
    assert short.saved == whole.saved
    assert short.default_saved == whole.default_saved
    assert (short.forward_flops, short.backward_flops) == (whole.forward_flops, whole.backward_flops)
    assert short.peak == whole.peak
    assert short.graphs == whole.graphs == 1


def test_runs_of_blocks():
    kinds = {"a": lambda: nn.Linear(3, 3, bias=False), "b": lambda: nn.LayerNorm(3), "c": nn.ReLU}
    model = nn.Sequential(nn.Sequential(*(kinds[kind]() for kind in "caaaaaabababababbbcc")))
    model.requires_grad_(False)
    assert list(runs_of(model, "0")) == [Run("0", 1, 1, 6), Run("0", 7, 2, 4)]


def test_peak_of_a_chain():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x))).sum()

    (record,) = dry_run(Chain(), (torch.zeros(10, 8),))
    wide, number, up, down = 4 * 10 * 32, 4, 4 * 8 * 32, 4 * 32 * 4
    peaks = record.counts["peaks"]
    # Where the gradient of the relu is made: its mask, the gradient that comes in and the zero that it is filled with
    # are alive, as are the result and the gradient of `down`; the relu itself was read for the last time.
    assert peaks[""] == max(peaks.values()) == number + down + wide // 4 + number + 2 * wide
    assert peaks["up"] == number + down + wide + up
