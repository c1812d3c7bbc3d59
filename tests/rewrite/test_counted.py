"""The counted proof: what a training step keeps and computes at published sizes, on the graphs of `torch.compile`.

Limits are those that the project set itself; sources of the figures of others stand beside them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rewrite.estimate import Estimate, Estimator, batch_of
from rewrite.runtime.scaling import Counts

GIB, TERA, GB = 2**30, 1e12, 1e9


def llama(**sizes: Any) -> nn.Module:
    """Llama-2-7B (Touvron et al. 2023) in bfloat16, without numbers; `sizes` make it another one."""
    geometry = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**geometry, **heads, **sizes})).to(torch.bfloat16)


def estimator(model: nn.Module, tokens: int, rows: int) -> Estimator:
    return Estimator(model, batch_of(model, tokens, rows))


@pytest.fixture(scope="module")
def seven() -> Estimator:
    return estimator(llama(), tokens=512, rows=1)


def work(counts: Counts) -> float:
    return counts.forward_flops + counts.backward_flops


def total(found: Estimate, saved: float) -> float:
    """Bytes of weights, adapters, gradients, AdamW's moments and what is saved."""
    held = sum(h.bytes for h in found.held)
    return held + 3 * sum(h.bytes for h in found.held if h.trains) + saved


LIMITS = {
    "lora(r=8)@attn.q,v": (1.58, 13.5),
    "lora(r=8)@attn.q,v + nf4(base)": (1.58, 13.5),
    "lora(r=32)@linear-head": (2.05, None),
    "s2ft(heads=2, channels=220)": (1.46, 13.55),
    "neuroada(k=1)@linear-head": (2.05, 13.5),
    "ladder(reduction=16)@blocks": (0.30, 7.1),
    "qst(reduction=16, r=16)@blocks": (0.30, None),
    "qst(reduction=16, r=16, down=pool)@blocks": (0.20, None),
    "lora(r=8)@attn.q,v + save(fp8)": (0.85, 13.5),
    "lora(r=8)@attn.q[-16:],attn.v[-16:]": (0.81, None),
}
"""Spec -> most GiB saved for the backward by the min-cut partition, most TFLOP of forward and backward."""


@pytest.mark.parametrize("spec", LIMITS)
def test_llama_2_7b_at_512_tokens(seven: Estimator, spec: str):
    gibibytes, teraflops = LIMITS[spec]
    counts = seven.estimate(spec).counts
    assert counts.graphs == 1
    assert counts.saved_bytes / GIB <= gibibytes
    if teraflops is not None:
        assert work(counts) / TERA <= teraflops
