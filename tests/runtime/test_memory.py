"""What is kept for backward: no weight, no float32 copy of an input, no more than PEFT with a bfloat16 adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.passes.record import GraphRecord
from rewrite.runtime import captures
from rewrite.runtime.attach import adapter_state
from tests.models import batch, build, step

MIB = 2**20
# The model of PEFT's published figures: full fine-tuning 24.4 MiB, LoRA on all linears 34.5, in bfloat16 21.6.
LLAMA: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
CASES = [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.bfloat16)]
ALL_LINEAR = "lora(r=8)@linear-head"


def llama() -> nn.Module:
    return build("llama", torch.bfloat16, **LLAMA)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def kept(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The tensors that autograd keeps after a forward in eager, one for each storage; parameters are not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found.setdefault(storage.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**given)
    return found


def mebibytes(found: dict[int, torch.Tensor]) -> float:
    return sum(t.untyped_storage().nbytes() for t in found.values()) / MIB


def partitioned(model: nn.Module, given: dict[str, torch.Tensor]) -> GraphRecord:
    """The record of the one graph of a compiled model, after a step."""
    step(model, model, given)
    (record,) = captures.records_of(model)
    assert record.counts["saved"]
    return record


def test_bfloat16_base_keeps_no_more_than_peft_with_a_bfloat16_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    full = mebibytes(kept(llama(), inputs()))
    default = mebibytes(kept(peft.get_peft_model(llama(), config), inputs()))
    limit = mebibytes(kept(peft.get_peft_model(llama(), config, autocast_adapter_dtype=False), inputs()))
    assert (round(full, 1), round(default, 1), round(limit, 1)) == (24.4, 34.5, 21.6)  # as published

    eager = rewrite.attach(llama(), ALL_LINEAR)
    assert {t.dtype for t in adapter_state(eager).values()} == {torch.float32}
    assert mebibytes(kept(eager, inputs())) <= limit

    model = rewrite.compile(llama(), ALL_LINEAR, backend="aot_eager")
    record = partitioned(model, inputs())
    assert record.counts["saved_bytes"] / MIB <= 0.75 * limit
    wide = {(4, 128, 256), (4, 128, 688), (512, 256), (512, 688)}
    cast_up = [s["name"] for s in record.counts["saved"] if s["dtype"] == "float32" and tuple(s["shape"]) in wide]
    assert cast_up == []


def test_activations_are_never_cast_up():
    model = nn.Sequential(nn.Linear(19, 13), nn.GELU(), nn.Linear(13, 7)).to(torch.bfloat16)
    rewrite.attach(model, "lora(r=3)@linear")
    x = torch.randn(5, 19, dtype=torch.bfloat16, requires_grad=True)
    shapes = {(5, 19), (5, 13), (5, 7)}
    own = {t.data_ptr() for t in model.parameters()}
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert any(tuple(t.shape) in shapes for t in seen)
    assert [tuple(t.shape) for t in seen if t.dtype == torch.float32 and t.data_ptr() not in own] == []
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_quantised_weight_is_never_kept(name: str, dtype: torch.dtype):
    model = build(name, dtype)
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    weights |= {(b, a) for a, b in weights}
    rewrite.compile(model, "lora(r=4)@attn.q,v + nf4(base)", backend="aot_eager")
    given = batch(name, rows=3, tokens=11, dtype=dtype)
    record = partitioned(model, given)
    assert not {tuple(s["shape"]) for s in record.counts["saved"]} & weights
    assert any(e.rule == "fuse_storage" for e in record.edits)
    sizes = {a * b for a, b in weights}
    assert [s for s in record.counts["saved"] if torch.Size(s["shape"]).numel() in sizes] == []


def test_checkpointing_keeps_the_inputs_of_the_blocks_alone():
    model = rewrite.compile(build("llama", torch.bfloat16), "lora(r=4)@linear-head + nf4(base)", backend="aot_eager")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.train()
    record = partitioned(model, batch("llama", rows=3, tokens=11))
    shapes = [tuple(s["shape"]) for s in record.counts["saved"] if s["dtype"] == "bfloat16"]
    assert shapes.count((3, 11, 64)) == 2
    assert (3, 11, 96) not in shapes
