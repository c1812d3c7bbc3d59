"""Virtual tokens: what methods that add some compute, next to HF PEFT, in training, in generation and compiled."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, StaticCache

import rewrite
from rewrite.runtime import attach as attaching
from rewrite.runtime.captures import records_of
from tests.models import assert_close, assert_same, batch, build, changed, disturb, frozen, gradients, step, traces

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
METHODS: dict[str, peft.PeftConfig] = {
    "prompt(n=5)": peft.PromptTuningConfig(**CAUSAL),
    "ptuning(n=5, hidden=12)": peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=12),
    "ptuning(n=5, encoder=lstm, hidden=12, layers=3)": peft.PromptEncoderConfig(
        **CAUSAL, encoder_hidden_size=12, encoder_reparameterization_type="LSTM", encoder_num_layers=3
    ),
    "prefix(n=5)": peft.PrefixTuningConfig(**CAUSAL),
    "prefix(n=5, hidden=12)": peft.PrefixTuningConfig(**CAUSAL, encoder_hidden_size=12, prefix_projection=True),
}
MIXED = "prompt(n=3) + prefix(n=4) + ptuning(n=2, hidden=7) + lora(r=2)@attn.q + nf4(base)"
every_method = pytest.mark.parametrize("spec", METHODS)
every_spec = pytest.mark.parametrize("spec", [*METHODS, MIXED])
decoders = pytest.mark.parametrize("name", ["llama", "gpt2"])
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def attached(name: str, spec: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return disturb(rewrite.attach(build(name, dtype), spec))


def peft_name(slot: str, tensors: dict[str, torch.Tensor]) -> str:
    """What PEFT's prompt encoders call a tensor of ours."""
    if slot in ("P", "V", "E"):
        return "embedding.weight"
    if slot.startswith(("weight_", "bias_")):
        return f"lstm_head.{slot}"
    network = "transform" if "E" in tensors else "mlp_head"
    return f"{network}.{2 * (int(slot[1:]) - 1)}.{'weight' if slot[0] == 'W' else 'bias'}"


def ours(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors of the only adapter by slot."""
    (adapter,) = model.adapters.values()  # type: ignore[operator,union-attr]
    return dict(adapter.named_parameters())


def theirs(name: str, spec: str, model: nn.Module) -> peft.PeftModel:
    """PEFT's model with the same tensors."""
    other = peft.get_peft_model(build(name), copy.deepcopy(METHODS[spec])).double()
    encoder, tensors = other.prompt_encoder["default"], ours(model)
    names = {peft_name(slot, tensors): value for slot, value in tensors.items()}  # type: ignore[arg-type]
    assert sorted(names) == sorted(n for n, _ in encoder.named_parameters())
    with torch.no_grad():
        for key, value in names.items():
            held = encoder.get_parameter(key)
            held.copy_(value.reshape(held.shape))
    return other


def padded(name: str, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch whose second row is shorter."""
    inputs = batch(name)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(-3, None) if side == "right" else slice(0, 3)] = 0
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


def test_every_method_of_tokens_is_tried():
    tried = {spec.partition("(")[0] for spec in METHODS}
    assert tried == {name for name, cls in rewrite.methods().items() if "tokens" in cls.kinds}


@decoders
@every_method
def test_equal_to_peft(name: str, spec: str):
    model = attached(name, spec)
    other = theirs(name, spec, model)
    for inputs in (batch(name), padded(name)):
        output, found = step(model, model, inputs)
        expected, wanted = step(other, other, inputs)
        assert_close(output.logits, expected.logits)
        assert_close(output.loss, expected.loss)
        wanted = {key.partition("default.")[2]: gradient for key, gradient in wanted.items()}
        renamed = {peft_name(key.rpartition(".")[2], ours(model)): g for key, g in found.items()}  # type: ignore[arg-type]
        assert_same({key: g.reshape(wanted[key].shape) for key, g in renamed.items()}, wanted)
        assert all(bool(gradient.any()) for gradient in found.values())


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@decoders
@every_method
def test_generates_what_peft_generates(name: str, spec: str):
    model = attached(name, spec).eval()
    other = theirs(name, spec, model).eval()
    inputs = {k: v for k, v in padded(name).items() if k != "labels"} | {"attention_mask": torch.ones(2, 9).long()}
    for settings in ({}, {"num_beams": 3}):
        assert torch.equal(
            model.generate(**inputs, **GREEDY, **settings), other.generate(**inputs, **GREEDY, **settings)
        )


@decoders
@every_spec
def test_generation_uses_the_cache_as_if_there_was_none(name: str, spec: str):
    model = attached(name, spec).eval()
    ids, mask = batch(name)["input_ids"], padded(name, "left")["attention_mask"]
    settings: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(ids, attention_mask=mask, **settings)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, again.sequences)
    for left, right in zip(cached.logits, again.logits, strict=True):
        assert_close(left, right)


@decoders
@every_method
def test_padding_on_the_left_changes_nothing(name: str, spec: str):
    model = attached(name, spec).eval()
    ids, mask = batch(name)["input_ids"], padded(name, "left")["attention_mask"]
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, first in ((0, 0), (1, 3)):
        alone = model.generate(ids[row : row + 1, first:], attention_mask=mask[row : row + 1, first:], **GREEDY)
        assert torch.equal(both[row, first:], alone[0])


@pytest.mark.parametrize(("name", "spec"), [*((n, s) for n in ("llama", "gpt2") for s in METHODS), ("llama", MIXED)])
def test_compiled_is_one_graph_and_equal(name: str, spec: str):
    torch.manual_seed(3)
    model = disturb(rewrite.compile(build(name), spec, backend="eager")).train()
    output, found = step(model, model, padded(name))
    expected, wanted = step(model, model._call_impl, padded(name))
    assert_close(output.loss, expected.loss)
    assert_close(output.logits, expected.logits)
    assert_same(found, wanted)
    assert len(records_of(model)) == 1
    calls = attaching.require(model).calls
    assert (calls.total, calls.eager) == (1, 0)
    assert "not captured yet" not in str(rewrite.explain(model))


@every_method
def test_the_spec_is_saved_loaded_removed_and_never_merged(spec: str, tmp_path: Path):
    model, base = attached("llama", spec), build("llama")
    names = list(attaching.adapter_state(model))
    assert names == [f"adapters.{spec.partition('(')[0]}.{slot}" for slot in ours(model)]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    rewrite.save(model, tmp_path)
    loaded = rewrite.load(build("llama"), tmp_path)
    in_place = rewrite.load(rewrite.attach(build("llama"), spec), tmp_path)
    expected = model(**batch("llama")).logits
    assert torch.equal(loaded(**batch("llama")).logits, expected)
    assert torch.equal(in_place(**batch("llama")).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**batch("llama")).logits, expected)
    with pytest.raises(rewrite.RewriteError, match=r"adds virtual tokens, it has no merged weight"):
        rewrite.merge(model)
    assert torch.equal(model(**batch("llama")).logits, expected)
    rewrite.remove(model)
    assert changed(frozen(base), frozen(model)) == []
    assert traces(model) == []
    assert torch.equal(model(**batch("llama")).logits, base(**batch("llama")).logits)


@every_method
def test_it_says_that_it_changes_the_function_at_step_0(spec: str):
    model, inputs = rewrite.attach(build("llama"), spec), batch("llama")
    assert not any(p.method.identity for p in rewrite.plan(build("llama"), spec).placements)
    moved = model(**inputs).logits[:, -9:] - build("llama")(**inputs).logits
    assert float(moved.detach().abs().max()) > 1e-6
    assert f"step 0: {spec.partition('(')[0]} changes the function" in str(rewrite.explain(model))


@every_method
def test_bfloat16_base(spec: str):
    model = attached("llama", spec, torch.bfloat16)
    assert {p.dtype for p in ours(model).values()} == {torch.float32}
    output, found = step(model, model, batch("llama", dtype=torch.bfloat16))
    assert output.logits.dtype == torch.bfloat16
    assert len(found) == len(ours(model))


@every_method
def test_arguments_by_position_embeddings_and_positions(spec: str):
    model = attached("llama", spec)
    ids, mask = batch("llama")["input_ids"], padded("llama")["attention_mask"]
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    positions = torch.arange(9).expand(2, -1)
    assert torch.equal(model(ids, mask, position_ids=positions).logits, expected)
    moved = model(ids, mask, position_ids=positions + positions).logits
    assert not torch.equal(moved, expected)


@torch.no_grad()
@every_method
def test_a_cache_that_the_caller_keeps(spec: str):
    model = attached("llama", spec).eval()
    ids = batch("llama", tokens=12)["input_ids"]
    expected = model(input_ids=ids).logits[:, -3:]
    cache = model(input_ids=ids[:, :9], use_cache=True)[CACHE]
    count = cache.get_seq_length()
    assert count == 14
    for mask in (None, torch.ones(2, 12).long(), torch.ones(2, 17).long()):
        held = copy.deepcopy(cache)
        assert_close(model(input_ids=ids[:, 9:], attention_mask=mask, **{CACHE: held}).logits, expected)
    with pytest.raises(rewrite.RewriteError, match=r"it must be of 12, or of all"):
        model(input_ids=ids[:, 9:], attention_mask=torch.ones(2, 10).long(), **{CACHE: cache})


def test_zero_prefixes_and_prompts_of_known_words():
    model = rewrite.attach(build("llama"), "prefix(n=5, init=zero) + prompt(n=4, init=vocab)")
    words = model.get_input_embeddings().weight
    prompt, prefix = (a.P.detach() for a in model.adapters.values())  # type: ignore[union-attr,operator]
    assert not prefix.any()
    assert all(bool((words == row).all(1).any()) for row in prompt)


def test_one_label_for_a_row_and_a_mask_of_token_types():
    inputs = batch("bert") | {"token_type_ids": torch.ones(2, 9).long()}
    model = attached("bert", "prompt(n=5)")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    other = peft.get_peft_model(build("bert"), config).double()
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(ours(model)["P"])
    expected = other(**inputs)
    output = model(**inputs)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss, expected.loss)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("t5", "prompt(n=5)", "the model has two inputs"),
        ("bert", "prefix(n=5)", "the model keeps no keys and values of past tokens"),
        ("vit", "prompt(n=5)", "'input' matches nothing"),
        ("llama", "prompt(n=5)@attn.q", "prompt cannot stand at 'attn.q'"),
        ("llama", "lora@input", "lora cannot stand at 'input'"),
        ("llama", "one: prompt(n=5)", "changes how many tokens there are"),
    ],
)
def test_where_it_cannot_stand(name: str, spec: str, reason: str):
    with pytest.raises(rewrite.ResolveError, match=reason):
        rewrite.attach(build(name), spec)


def test_what_a_model_with_virtual_tokens_refuses():
    model, inputs = attached("llama", "prefix(n=5)"), batch("llama")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(rewrite.RewriteError, match=r"which gradient checkpointing drops"):
        model.train()(**inputs)
    model.eval()
    with pytest.raises(rewrite.RewriteError, match=r"attention mask of \(rows, tokens\)"):
        model(inputs["input_ids"], torch.ones(2, 1, 9, 9))
    with pytest.raises(rewrite.RewriteError, match=r"input_ids or inputs_embeds"):
        model()
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(rewrite.RewriteError, match=r"cache that grows"):
        model.generate(inputs["input_ids"], **{CACHE: static}, **GREEDY)


def test_checkpointing_with_a_prompt_gives_the_same_gradients():
    model, inputs = attached("llama", "prompt(n=5) + lora(r=2)@attn.q").train(), batch("llama")
    _, wanted = step(model, model, inputs)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    _, found = step(model, model, inputs)
    assert_same(found, wanted)
    assert gradients(model) == {}
