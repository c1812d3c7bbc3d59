"""Coupled structures: permuting them changes nothing, shrinking leaves out what it says, recovering puts it back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rewrite
from rewrite.runtime.attach import adapter_state
from tests.models import assert_close, batch, build, changed, disturb, frozen, step

SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12},
}


def made(cls: type, config: type, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**{**SIZES, **changes})).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.normal_(1 if "norm" in name else 0, 0.5)
    return model


MODELS = {
    "llama": lambda: made(LlamaForCausalLM, LlamaConfig),
    "qwen2": lambda: made(Qwen2ForCausalLM, Qwen2Config),  # with biases on q, k and v
    "qwen3": lambda: build("qwen3"),  # norms of heads
    "gpt2": lambda: build("gpt2"),  # fused, transposed, with biases
    "bert": lambda: build("bert"),
}


def given(name: str) -> dict[str, Any]:
    return batch(name if name in ("bert", "t5") else "llama")


def shuffled(group: Any, seed: int = 1) -> list[int]:
    """A random order that keeps heads which share a key together."""
    g = torch.Generator().manual_seed(seed)
    shares = torch.randperm(group.count // group.sharing, generator=g).tolist()
    inner = [torch.randperm(group.sharing, generator=g).tolist() for _ in shares]
    return [share * group.sharing + i for share, order in zip(shares, inner, strict=True) for i in order]


def kept(group: Any) -> list[int]:
    """Every other share of heads, or the channels that are no multiple of three."""
    if group.kind == "channels":
        return [i for i in range(group.count) if i % 3]
    return [i for i in range(group.count) if (i // group.sharing) % 2 == 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "bert"])
def test_a_permutation_changes_weights_and_not_the_function(name: str):
    model, base = MODELS[name](), MODELS[name]()
    found = rewrite.coupled(model)
    assert {g.kind for g in found.groups.values()} == {"heads", "channels"}
    assert len(found.groups) == 4
    order = {n: shuffled(g) for n, g in found.groups.items()}
    assert found.permute(order) is model
    outputs, expected = step(model, model, given(name)), step(base, base, given(name))
    assert_close(outputs[0].logits, expected[0].logits, 1e-12)
    moved = {n.rpartition(".")[0] for n in changed(frozen(base), frozen(model))}
    assert moved == {m.path for g in found.groups.values() for m in g.members}
    for group, units in ((g, order[n]) for n, g in found.groups.items()):  # gradients go with their weights
        last = next(m for m in group.members if m.side == "columns")
        ours, theirs = (last.map.matrix(o[1][f"{last.path}.weight"]) for o in (outputs, expected))
        assert_close(ours, theirs[:, last.entries(units)], 1e-10)


def test_biases_and_rotary_positions_go_with_their_head():
    model = MODELS["qwen2"]()
    found = rewrite.coupled(model)
    group = found["model.layers.0.self_attn"]
    before = model.get_parameter("model.layers.0.self_attn.q_proj.bias").detach().clone()
    found.permute({group.name: [4, 5, 1, 0, 2, 3]})
    after = model.get_parameter("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(after.view(6, 12), before.view(6, 12)[[4, 5, 1, 0, 2, 3]])
    # Without them it is another function: this is what the check is for.
    broken = MODELS["qwen2"]()
    with torch.no_grad():
        for path in ("q_proj", "k_proj", "v_proj"):
            module = broken.get_submodule(f"model.layers.0.self_attn.{path}")
            good = model.get_submodule(f"model.layers.0.self_attn.{path}")
            module.weight.copy_(good.weight)  # type: ignore[operator,union-attr,arg-type]
        o = "model.layers.0.self_attn.o_proj.weight"
        broken.get_parameter(o).copy_(model.get_parameter(o))
    assert (broken(**batch("llama")).logits - model(**batch("llama")).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ([0, 2, 1, 3, 4, 5], "share keys, 2 each"),
        ([0, 1, 2, 3], "all 6 heads, got 4"),
        ([0, 1, 2, 3, 4, 4], "each at most once"),
        ([0, 1, 2, 3, 4, 6], "heads 0 to 5"),
    ],
)
def test_an_order_that_breaks_groups_is_refused(order: list[int], reason: str):
    model, before = MODELS["llama"](), frozen(MODELS["llama"]())
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.coupled(model).permute({"model.layers.0.self_attn": order})
    assert changed(before, frozen(model)) == []


def test_names_are_corrected():
    with pytest.raises(rewrite.RewriteError, match=r"nearest: model\.layers\.0\.self_attn"):
        rewrite.coupled(MODELS["llama"]())["model.layers.0.self_atn"]


def test_heads_that_a_model_tells_apart_are_left_alone():
    slopes = made(BloomForCausalLM, BloomConfig, n_head=6, n_layer=1)
    with torch.no_grad():
        for parameter in slopes.parameters():
            parameter.mul_(4)
    before = frozen(slopes)
    found = rewrite.coupled(slopes)
    for group in (g for g in found.groups.values() if g.kind == "heads"):
        with pytest.raises(rewrite.RewriteError, match="does not treat its heads alike"):
            found.permute({group.name: shuffled(group)})
    norms = made(Olmo2ForCausalLM, Olmo2Config)  # one norm over all heads
    with pytest.raises(rewrite.RewriteError, match="does not treat its heads alike"):
        rewrite.coupled(norms).permute({"model.layers.0.self_attn": [2, 3, 0, 1, 4, 5]})
    with pytest.raises(rewrite.RewriteError):
        rewrite.coupled(norms).shrink({"model.layers.0.self_attn": [0, 1, 2, 3]})
    assert changed(before, frozen(slopes)) == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "bert"])
def test_a_shrunk_model_is_the_model_without_those_heads_and_channels(name: str):
    model, base = MODELS[name](), MODELS[name]()
    found = rewrite.coupled(model)
    keep = {n: kept(g) for n, g in found.groups.items()}
    found.shrink(keep)
    with torch.no_grad():
        for n, group in found.groups.items():
            last = next(m for m in group.members if m.side == "columns")
            gone = last.entries([i for i in range(group.count) if i not in keep[n]])
            base.get_submodule(last.path).weight[:, gone] = 0  # type: ignore[operator,index]
    assert_close(model(**given(name)).logits, base(**given(name)).logits, 1e-12)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in base.parameters())
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in linears)
    assert rewrite.plan(model, "lora(r=2)@attn,ffn")


def test_channels_of_transposed_weights_shrink_and_sizes_of_their_own_are_taken_back():
    model, before = build("gpt2"), frozen(build("gpt2"))
    found = rewrite.coupled(model)
    heads = "transformer.h.0.attn"
    with pytest.raises(rewrite.RewriteError, match="does not run with other sizes"):
        found.shrink({heads: [0, 2]})
    assert changed(before, frozen(model)) == []
    assert model.get_submodule("transformer.h.0.attn.c_attn").nf == 192
    found.shrink({"transformer.h.0.mlp": range(0, 256, 2)})
    assert model.get_parameter("transformer.h.0.mlp.c_proj.weight").shape == (128, 64)


def test_an_adapted_model_is_refused():
    model = rewrite.attach(build("llama"), "lora(r=2)@attn.q")
    with pytest.raises(rewrite.RewriteError, match=r"before rewrite\.attach"):
        rewrite.coupled(model)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_a_shrunk_model_learned_is_exact_on_the_kept_parts_of_the_whole(name: str):
    spec = "lora(r=3)@attn,ffn"
    full, small = MODELS[name](), MODELS[name]()
    found, less = rewrite.coupled(full), rewrite.coupled(small)
    keep = {n: kept(g) for n, g in found.groups.items()}
    rewrite.attach(less.shrink(keep), spec)
    disturb(small)
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.1)
    small(**batch("llama")).loss.backward()
    optimizer.step()
    rewrite.attach(full, spec)
    assert found.recover(small, keep) is full
    merged, lesser = (rewrite.merge(copy.deepcopy(m)) for m in (full, small))
    base = MODELS[name]()
    for group, units in ((g, keep[n]) for n, g in found.groups.items()):
        for member, own in group.per_member(units):
            W, w, B = (member.map.matrix(m.get_submodule(member.path).weight.detach()) for m in (merged, lesser, base))  # type: ignore[union-attr,operator,arg-type]
            index = member.entries(own)
            assert_close(W.index_select(member.dim, index), w, 1e-12)
            rest = torch.tensor([i for i in range(member.width) if i not in index])
            assert torch.equal(W.index_select(member.dim, rest), B.index_select(member.dim, rest))
    with torch.no_grad():  # and the whole function, without the others
        for n, group in found.groups.items():
            last = next(m for m in group.members if m.side == "columns")
            gone = last.entries([i for i in range(group.count) if i not in keep[n]])
            merged.get_submodule(last.path).weight[:, gone] = 0  # type: ignore[operator,index]
    assert_close(merged(**batch("llama")).logits, small(**batch("llama")).logits, 1e-12)


def test_recovering_needs_the_same_adapters():
    full, small = build("llama"), build("llama")
    found, keep = rewrite.coupled(full), {"model.layers.0.mlp": range(0, 96, 2)}
    rewrite.attach(rewrite.coupled(small).shrink(keep), "lora(r=3)@ffn")
    rewrite.attach(full, "lora(r=3)@attn")
    with pytest.raises(rewrite.RewriteError, match="takes the shrunk model"):
        found.recover(full, keep)
    with pytest.raises(rewrite.RewriteError, match="attach the same spec"):
        found.recover(small, keep)
    assert not any(bool(t.any()) for n, t in adapter_state(full).items() if n.endswith(".B"))


def test_a_permutation_brings_chosen_channels_together():
    """What is scattered becomes a run, which is cut out of the base product (`s2ft`)."""
    model, base = build("llama"), build("llama")
    name = "model.layers.0.mlp"
    scores = base.get_submodule(f"{name}.down_proj").weight.detach().abs().sum(0)
    order = scores.argsort(descending=True).tolist()
    rewrite.coupled(model).permute({name: order})
    down = model.get_submodule(f"{name}.down_proj").weight.detach()
    assert torch.equal(down.abs().sum(0).argsort(descending=True, stable=True), torch.arange(96))
    assert_close(model(**batch("llama")).logits, base(**batch("llama")).logits, 1e-12)


def test_cross_attention_moves_and_one_position_bias_a_head_does_not():
    model, base = build("t5"), build("t5")
    found = rewrite.coupled(model)
    cross = [n for n in found.groups if "EncDec" in n]
    assert len(cross) == 2
    found.permute({n: shuffled(found[n]) for n in cross})
    assert_close(model(**batch("t5")).logits, base(**batch("t5")).logits, 1e-12)
    with torch.no_grad():
        model.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight").mul_(3)
    with pytest.raises(rewrite.RewriteError, match="does not treat its heads alike"):
        found.permute({"encoder.block.0.layer.0.SelfAttention": [1, 0, 2, 3]})
