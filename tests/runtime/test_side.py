"""Side networks: beside the blocks of a model, never inside of its backward pass."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rewrite
from rewrite.runtime.captures import records_of
from rewrite.runtime.dry_run import dry_run
from tests.models import (
    ONE_LAYER,
    assert_close,
    assert_same,
    batch,
    build,
    changed,
    disturb,
    frozen,
    gradients,
    step,
    traces,
)

LADDERS = ("ladder(reduction=4)", "ladder(reduction=4, gate=vector, init=random)")
QST = ("qst(reduction=4, r=3)", "qst(reduction=5, down=pool, gate=scalar, init=pruned)")
OTHERS = ("unipt(reduction=3)", "sherl(reduction=3)")
NETWORKS = (*LADDERS, *QST, *OTHERS)
"""A width that the reduction divides, and one that it does not."""


def plain(name: str, **changes: Any) -> nn.Module:
    """A model whose weights are frozen, as they are beside a network: some kernels are chosen by that."""
    return build(name, **changes).eval().requires_grad_(False)


def cached(model: nn.Module, ids: torch.Tensor, past: Any) -> Any:
    """A call that goes on from the keys and values of past tokens, which transformers has two names for."""
    known = inspect.signature(type(model).forward).parameters
    return model(input_ids=ids, **{"cache" if "cache" in known else "past_key_values": past}, use_cache=True)


def attached(name: str, spec: str, **changes: Any) -> nn.Module:
    return disturb(rewrite.attach(plain(name, **changes), spec))


@pytest.mark.parametrize("spec", NETWORKS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_identity_at_step_0_and_all_of_it_trains(name: str, spec: str):
    model, inputs = plain(name), batch(name)
    expected = model(**inputs).logits
    planned = rewrite.plan(model, spec)
    base = frozen(model)
    rewrite.attach(model, spec)
    assert torch.equal(model(**inputs).logits, expected)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == planned.trainable
    moved: set[str] = set()
    for seed in range(4):  # a rectifier may be shut for all tokens at once
        output, found = step(disturb(model, seed=seed), model, inputs)
        assert (output.logits - expected).abs().max() > 1e-4
        assert found.keys() == trained.keys()
        moved |= {name for name, gradient in found.items() if gradient.any()}
    assert moved == trained.keys()
    rewrite.remove(model)
    assert changed(base, frozen(model)) == []
    assert traces(model) == []
    assert torch.equal(model(**inputs).logits, expected)


COMPILED = {
    "llama": LADDERS[0],
    "vit": "vqt(q=2)",
    "t5": LADDERS[1],
    "bert": QST[0],
    "gpt2": QST[1],
    "qwen3": OTHERS[0],
}


@pytest.mark.parametrize(
    "name", [n if n in ("llama", "vit") else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED]
)
def test_compiled_is_one_graph_and_equals_eager(name: str):
    counters.clear()
    model, inputs = plain(name, **ONE_LAYER[name]), batch(name)
    rewrite.compile(model, COMPILED[name], backend="aot_eager")
    disturb(model)
    output, found = step(model, model, inputs)
    expected, wanted = step(model, model._call_impl, inputs)
    assert_close(output.logits, expected.logits)
    assert_same(found, wanted)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert records_of(model)[0].inputs  # the graph that was counted is the model's
    assert "none in eager" in rewrite.explain(model)
    assert "not captured" not in rewrite.explain(model)


@pytest.mark.parametrize("spec", [LADDERS[0], QST[1], *OTHERS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_is_generation_without(name: str, spec: str):
    model = disturb(rewrite.attach(plain(name), spec), 0.3)
    ids = torch.randint(3, 100, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if name == "t5":  # padded behind
        mask = mask.flip(1)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        both = [
            model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, num_beams=beams, **settings)  # type: ignore[operator]
            for cached in (True, False)
        ]
        assert torch.equal(*both)


@pytest.mark.parametrize("spec", [LADDERS[0], QST[0], *OTHERS])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_with_past_keys_is_the_same_step(name: str, spec: str):
    model = attached(name, spec)
    ids = torch.randint(3, 100, (2, 7))
    whole = model(input_ids=ids, use_cache=False).logits
    first = model(input_ids=ids[:, :3], use_cache=True)
    parts, past = [first.logits], first.past_key_values
    for piece in (ids[:, 3:4], ids[:, 4:7]):
        following = cached(model, piece, past)
        parts.append(following.logits)
    assert_close(torch.cat(parts, 1), whole, 1e-7)


@pytest.mark.parametrize("spec", [LADDERS[0], *OTHERS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_padding_is_not_seen(name: str, spec: str):
    model = attached(name, spec)
    ids = torch.randint(3, 100, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    extra = {"decoder_input_ids": torch.randint(3, 100, (1, 4))} if name == "t5" else {}
    other = torch.where(mask == 1, ids, torch.randint(3, 100, ids.shape))
    one, two = (model(input_ids=x, attention_mask=mask, **extra).logits for x in (ids, other))
    keep = slice(None) if name in ("bert", "t5") else slice(0, 5)
    assert_close(one[:, keep], two[:, keep], 1e-12)
    short = model(input_ids=ids[:, :5], **extra).logits
    assert_close(one[:, keep], short[:, keep], 1e-9)


def test_an_encoder_that_is_called_by_itself_takes_its_side_network_along():
    model, inputs = attached("t5", LADDERS[0]), batch("t5")
    expected = model(**inputs).logits
    encoded = model.get_encoder()(input_ids=inputs["input_ids"])  # type: ignore[operator]
    assert torch.equal(model(encoder_outputs=encoded, labels=inputs["labels"]).logits, expected)
    bare = encoded.last_hidden_state
    with pytest.raises(rewrite.RewriteError, match="reads the side network of the encoder, which did not run"):
        model(encoder_outputs=(bare,), labels=inputs["labels"])


def test_saved_loaded_copied(tmp_path: Path):
    model, inputs = attached("t5", LADDERS[0]), batch("t5")
    expected = model(**inputs).logits
    rewrite.save(model, tmp_path)
    loaded = rewrite.load(plain("t5"), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    copied = copy.deepcopy(model)
    disturb(model)
    assert torch.equal(copied(**inputs).logits, expected)
    assert (model(**inputs).logits - expected).abs().max() > 1e-4
    fresh = rewrite.attach(plain("t5"), LADDERS[0])
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(fresh(**inputs).logits, expected)
    assert copied.float()(**inputs).logits.dtype == torch.float32


def test_it_does_not_merge():
    model, inputs = attached("llama", QST[0]), batch("llama")
    before = model(**inputs).logits
    with pytest.raises(rewrite.RewriteError, match="a network beside the model, it has no merged weight"):
        rewrite.merge(model)
    assert torch.equal(model(**inputs).logits, before)


def test_dropped_layers_have_no_rung():
    model = rewrite.attach(plain("llama", num_hidden_layers=4), "ladder(reduction=4)@blocks[1::2]")
    rungs = [n for n, _ in model.named_modules() if n.endswith("adapters.ladder")]
    assert rungs == ["model.layers.1.adapters.ladder", "model.layers.3.adapters.ladder"]
    _, found = step(disturb(model), model, batch("llama"))
    assert all(bool(g.any()) for g in found.values())
    first = rewrite.plan(plain("t5"), "ladder(reduction=4)@enc.blocks")
    assert [p.site.part for p in first.placements] == ["entry", "rung", "rung", "end"]


def test_one_stack_alone_is_exact():
    """A network beside the encoder alone reaches the loss through the decoder, one beside the decoder through none."""
    for side in ("enc", "dec"):
        model = attached("t5", f"ladder(reduction=4)@{side}.blocks")
        _, found = step(model, model, batch("t5"))
        assert all(bool(g.any()) for g in found.values())


def test_beside_a_quantised_backbone():
    model = plain("llama", intermediate_size=128)
    rewrite.attach(model, "qst(reduction=4, r=4)@blocks + nf4(base)")
    stored = [h for h in rewrite.runtime.holdings.holdings(model) if h.storage == "nf4"]  # type: ignore[attr-defined]
    assert stored
    disturb(model)
    _, found = step(model, model, batch("llama"))
    assert all(".adapters.qst" in name for name in found)


def test_an_adapter_inside_of_the_backbone_gets_its_whole_gradient():
    """Nothing is detached: what a tap gives to an adapter below it is in the gradient, as finite differences say."""
    # GPT-2, and no loss of its own: Llama's norms and the losses of transformers are float32 whatever the model is.
    model, inputs = attached("gpt2", "ladder(reduction=4)@blocks + lora(r=2)@attn.q"), batch("gpt2")
    model(**inputs).logits.square().mean().backward()
    found = gradients(model)
    name = next(n for n in found if n.endswith("h.0.attn.c_attn.adapters.lora_q.A"))
    parameter, gradient = model.get_parameter(name), found[name]
    direction = torch.randn_like(gradient)
    losses = []
    for eps in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.add_(direction, alpha=eps)
            losses.append(float(model(**inputs).logits.square().mean()))
            parameter.add_(direction, alpha=-eps)
    assert abs((losses[0] - losses[1]) / 2e-5 - float((gradient * direction).sum())) < 1e-8


def test_named_networks_are_switched():
    model, inputs = plain("llama"), batch("llama")
    base = model(**inputs).logits
    rewrite.attach(model, "a: ladder(reduction=4)@blocks + b: qst(reduction=4)@blocks")
    disturb(model)
    rewrite.use(model, None)
    assert torch.equal(model(**inputs).logits, base)
    rewrite.use(model, "a")
    alone = model(**inputs).logits
    rewrite.use(model, {"a": 1.0, "b": 1.0})
    assert (model(**inputs).logits - alone).abs().max() > 1e-4
    ids = inputs["input_ids"]
    first = model(input_ids=ids[:, :5], use_cache=True)
    rest = cached(model, ids[:, 5:], first.past_key_values).logits
    assert_close(rest, model(input_ids=ids, use_cache=False).logits[:, 5:], 1e-7)


def test_gradient_checkpointing():
    model, inputs = attached("llama", LADDERS[0]), batch("llama")
    model.train()
    expected, wanted = step(model, model, {**inputs, "use_cache": False})
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    output, found = step(model, model, {**inputs, "use_cache": False})
    assert torch.equal(output.logits, expected.logits)
    assert_same(found, wanted)


def test_the_backbone_has_no_backward():
    """On the graphs of the compiled step: no product of the backward pass reads or makes a weight of the model's but
    the head's, and what is kept is narrow but for the taps."""
    model = rewrite.attach(plain("llama", hidden_size=96, intermediate_size=224), "qst(reduction=8, down=pool)@blocks")
    ids = torch.zeros(1, 33, dtype=torch.long)
    (record,) = dry_run(model, kwargs={"input_ids": ids, "labels": ids, "use_cache": False})
    kept = [tuple(s["shape"]) for s in record.counts["saved"]]  # type: ignore[index]
    wide = [shape for shape in kept if shape and shape[-1] in (96, 224)]
    assert len(wide) <= 1  # the gradient of the stream at the head, where the loss is taken in chunks
    whole = sum(p.numel() for p in model.parameters() if not p.requires_grad) * 2 * 33
    assert 0 < record.counts["backward_flops"] < whole / 10  # type: ignore[operator]


@pytest.mark.parametrize("spec", NETWORKS)
def test_it_trains(spec: str):
    torch.manual_seed(0)
    model = rewrite.attach(build("llama", torch.float32), spec)
    inputs = batch("llama", rows=4, tokens=12)
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(15):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
