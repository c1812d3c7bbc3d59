"""What a chunked loss keeps and computes at the size of Llama-2-7B, counted on the partitioned graphs."""

from __future__ import annotations

import functools

import pytest
import torch

import rewrite
from rewrite.passes.record import GraphRecord
from rewrite.runtime import backend
from rewrite.runtime import dry_run as counted

transformers = pytest.importorskip("transformers")

TOKENS, CLASSES, WIDTH = 512, 32000, 4096


@functools.cache
def step(spec: str, chunked: bool, tokens: int = TOKENS) -> GraphRecord:
    """One block of the model, head and loss, in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, vocab_size=CLASSES,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    rewrite.attach(model, spec)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counted, "lowered", lambda gm, record, _: backend.lowered(gm, record, chunked))
        (record,) = counted.dry_run(model, kwargs={"input_ids": ids, "labels": ids})
    return record


def saved(record: GraphRecord) -> int:
    return sum(s["bytes"] for s in record.counts["default_saved"])


def flops(record: GraphRecord) -> int:
    return record.counts["forward_flops"] + record.counts["backward_flops"]


SPECS = ("lora(r=8)@attn.q,v", "lora(r=8)@attn.q,v + nf4(linear)", "lora(r=8)@attn.q,v,head")


@pytest.mark.parametrize("spec", SPECS)
def test_a_gradient_of_the_hidden_state_instead_of_logits(spec):
    plain, chunked = step(spec, False), step(spec, True)
    logits, hidden = 4 * TOKENS * CLASSES, 2 * TOKENS * WIDTH
    # An adapter on the head has a gradient too, but the input that it kept is the hidden state that is returned.
    instead = 2 * 8 * (TOKENS + CLASSES) - 2 * 8 * TOKENS if "head" in spec else hidden
    assert saved(plain) - saved(chunked) == pytest.approx(logits - instead, rel=1e-3)
    # The one matrix with an entry a class is the adapter's gradient.
    shapes = [tuple(s["shape"]) for s in chunked.counts["saved"] if CLASSES in s["shape"]]
    assert shapes == ([(CLASSES, 8)] if "head" in spec else [])


@pytest.mark.parametrize("spec", SPECS)
def test_no_operation_more(spec):
    assert flops(step(spec, True)) == flops(step(spec, False))


def test_the_peak_falls():
    plain, chunked = (max(step(SPECS[0], c).counts["peaks"].values()) for c in (False, True))
    assert chunked < plain - 4 * TOKENS * CLASSES


@pytest.mark.parametrize(("tokens", "rewritten"), [(512, False), (4096, True)])
def test_a_head_that_trains_is_chunked_where_that_keeps_less(tokens, rewritten):
    spec = "lora(r=8)@attn.q,v + full(head)"
    plain, chunked = step(spec, False, tokens), step(spec, True, tokens)
    assert any(edit.rule == "chunk_loss" for edit in chunked.edits) == rewritten
    assert flops(chunked) == flops(plain)
    assert (saved(chunked) < saved(plain)) == rewritten
    assert (max(chunked.counts["peaks"].values()) < max(plain.counts["peaks"].values())) == rewritten
