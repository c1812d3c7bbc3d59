"""explain: golden text of a compiled decoder, and every state that a model can be in."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rewrite
from rewrite.passes.record import summarise
from rewrite.runtime.attach import require
from rewrite.runtime.backend import rewrite_backend
from rewrite.runtime.captures import records_of
from rewrite.runtime.merge import merge_report
from tests.rewrite.decoder import IDS, SPEC, Decoder, compiled


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return compiled()


def stable(text: str) -> str:
    """Without what differs between runs, edits and machines: numbers of graphs, lines of code, instruction sets."""
    titles = {title: f"graph_{i}" for i, title in enumerate(dict.fromkeys(re.findall(r"graph_\d+", text)))}
    text = re.sub(r"graph_\d+", lambda m: titles[m.group()], text)
    text = re.sub(r"(on the CPU: ).*", r"\1...", text)
    return re.sub(r"\.py:\d+", ".py:N", text)


def test_text(decoder: nn.Module, golden: Callable[..., None]):
    golden(stable(rewrite.explain(decoder)))


def test_shows_as_it_is_at_a_prompt(decoder: nn.Module):
    text = rewrite.explain(decoder)
    assert isinstance(text, str)
    assert repr(text) == str(text)


def test_changes_nothing(decoder: nn.Module):
    before = {n: p.clone() for n, p in decoder.named_parameters()}
    calls = require(decoder).calls.total
    assert rewrite.explain(decoder) == rewrite.explain(decoder)
    assert require(decoder).calls.total == calls
    assert all(torch.equal(p, before[n]) for n, p in decoder.named_parameters())


def test_every_placement_is_told_and_served(decoder: nn.Module):
    text = rewrite.explain(decoder)
    assert "rewrite.adapted_linear" in text
    assert "plain operators" not in text
    assert "not captured yet" not in text
    for graft in require(decoder).grafts:
        assert graft.label in text


def test_plain_model():
    text = rewrite.explain(nn.Linear(3, 2))
    assert text == "Linear: nothing is attached\n8 parameters"


def test_attached_and_not_compiled():
    text = rewrite.explain(rewrite.attach(Decoder(), SPEC))
    assert "not compiled: every call runs in eager" in text
    assert "graph" not in text


def test_before_the_first_call():
    text = rewrite.explain(rewrite.compile(Decoder(), SPEC, backend="eager"))
    assert "compiled with backend eager, not called yet" in text
    assert "not captured yet" not in text


def test_share_is_that_of_the_plan():
    planned = rewrite.plan(Decoder(), SPEC)
    second = str(planned).splitlines()[1]
    assert str(rewrite.explain(rewrite.attach(Decoder(), SPEC))).splitlines()[1] == second


def test_base_counts_every_parameter_and_its_bits():
    text = rewrite.explain(rewrite.attach(Decoder(), "nf4(base)"))
    (stored,) = re.findall(r"^nf4 +uint8, float32 +([\d,]+) +(\S+) ", text, re.MULTILINE)
    (dense,) = re.findall(r"^dense +float32 +([\d,]+) +(\S+) ", text, re.MULTILINE)
    assert stored[1] == "4.5"
    assert dense[1] == "32"
    total = sum(p.numel() for p in Decoder().parameters())
    assert int(stored[0].replace(",", "")) + int(dense[0].replace(",", "")) == total


@pytest.mark.parametrize("spec", [SPEC, "lora(r=4)@attn.q", "nf4(base)"])
def test_what_step_0_changes(spec: str):
    text = rewrite.explain(rewrite.attach(Decoder(), spec))
    assert "the adapters change the function by nothing" in text
    assert ("nf4 rounds the weights that it stores" in text) is ("nf4" in spec)


def test_merged_and_removed():
    model = rewrite.attach(Decoder(), "lora(r=4)@attn.q,v")
    rewrite.merge(model)
    assert str(merge_report(model)) in rewrite.explain(model)
    assert "merged 'lora(r=4)@attn.q,v' into 4 weights" in rewrite.explain(model)
    model = rewrite.remove(rewrite.attach(Decoder(), "lora(r=4)@attn.q,v"))
    assert "nothing is attached" in rewrite.explain(model)


def test_calls_that_fell_back():
    model = rewrite.compile(Decoder(), "lora(r=4)@attn.q", backend="eager")
    with torch._dynamo.config.patch(disable=True):
        model(IDS)
    text = rewrite.explain(model)
    assert "1 call, 1 in eager" in text
    assert "TORCH_LOGS=recompiles,graph_breaks" in text


def test_a_graph_of_a_part_leaves_the_rest_uncaptured():
    model: Decoder = rewrite.attach(Decoder(), "lora(r=4)@linear")  # type: ignore[assignment]
    part = torch.compile(model.layers[0].self_attn, backend=rewrite_backend, options={"backend": "eager"})
    part(torch.randn(2, 9, 64))
    text = rewrite.explain(model)
    assert "1 graph captured by torch.compile of this model or a part of it" in text
    rest = [f"layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    assert f"not captured yet: lora(r=4) x7 at {summarise([*rest, 'lm_head'])}" in text


def test_a_fallback_has_its_reason():
    model = rewrite.compile(Decoder(), "lora(r=4)@attn.q + full(attn.q)", backend="eager")
    model(IDS)
    (line,) = [line for line in rewrite.explain(model).splitlines() if "plain operators" in line]
    assert line.split()[:3] == ["plain", "operators", "2"]
    assert line.endswith("lora(r=4): not fused: its base weight is trained")


def test_a_layer_that_is_fused_in_part_says_so():
    model = compiled("lora(r=4)@attn.q")
    records_of(model)[0].note("layers.0.self_attn.q_proj", "one branch is left")
    records_of(model)[0].note("layers.1.mlp", "something else")
    text = rewrite.explain(model)
    assert re.search(
        r"adapted_linear, plain operators +1  layers.0.self_attn.q_proj  lora\(r=4\): one branch is left", text
    )
    assert re.search(r"adapted_linear +1  layers.1.self_attn.q_proj  lora\(r=4\)$", text, re.MULTILINE)
    assert "note: layers.1.mlp: something else" in text


def test_two_models_do_not_mix():
    first, second = compiled("lora(r=4)@attn.q"), compiled("lora(r=2)@attn.v")
    assert "v_proj" not in rewrite.explain(first)
    assert "q_proj" not in rewrite.explain(second)
