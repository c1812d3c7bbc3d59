"""Every method is one graph on Llama, or the first model here that it fits: no break, also with gradient
checkpointing, and equal to eager."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

import rewrite
from rewrite import inventory, planning
from rewrite.runtime.attach import require
from tests.models import assert_close, assert_same, disturb, gradients, in_own_dtype
from tests.rewrite.variants import binds, variants

transformers = pytest.importorskip("transformers")

SITES = ("linear-head", "attn.q,v", "norm", "embed", "attn.o,ffn.down")


def llama(layers: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", attention_bias=True,
    )  # fmt: skip
    return in_own_dtype(transformers.LlamaForCausalLM(config).double())


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, num_labels=53, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return in_own_dtype(transformers.BertForTokenClassification(config).double())


HOMES = {"llama": llama, "two layers": functools.partial(llama, 2), "encoder": encoder}
"""Models by name, in the order in which they are tried; all take token ids, and a label for each."""


@functools.cache
def home(name: str) -> str:
    """The first model that a method fits with its plain call: most fit the first one."""
    if rewrite.methods()[name].default_sites is None or rewrite.methods()[name].policy:
        return "llama"
    for model in HOMES:
        try:
            planning.resolve(places(model), spec(name))
            return model
        except rewrite.ResolveError:
            continue
    raise AssertionError(f"{name} fits none of {', '.join(HOMES)}")


def spec(name: str) -> str:
    """The method called as plainly as it can be, where it goes by default, or at the first site that it takes.

    A policy changes nothing by itself: it is tried beside an adapter.
    """
    if rewrite.methods()[name].policy:
        return f"lora(r=3)@linear + {policy(name)}"
    call = next(f"{name}({args})" for args in variants(rewrite.methods()[name]) if binds(f"{name}({args})"))
    if rewrite.methods()[name].default_sites is not None:
        return call
    for words in SITES:
        try:
            rewrite.plan(llama(), f"{call}@{words}")
            return f"{call}@{words}"
        except rewrite.ResolveError:
            continue
    raise AssertionError(f"{name} takes none of {SITES}")


def policy(name: str) -> str:
    """A policy with the first arguments that fit a model of one layer."""
    for call in (f"{name}({args})".removesuffix("()") for args in variants(rewrite.methods()[name])):
        try:
            rewrite.plan(llama(), f"lora(r=3)@linear + {call}")
            return call
        except rewrite.Error:
            continue
    raise AssertionError(f"{name} does not fit")


@functools.cache
def places(model: str) -> inventory.Inventory:
    """What a model is made of, found out once."""
    return take(HOMES[model]())


take = inventory.take


@pytest.fixture(autouse=True)
def known_places(monkeypatch: pytest.MonkeyPatch):
    def known(model: torch.nn.Module, batch: object = None) -> inventory.Inventory:
        if isinstance(model, transformers.BertForTokenClassification):
            return places("encoder")
        return places("llama" if len(model.model.layers) == 1 else "two layers")  # type: ignore[union-attr,arg-type]

    monkeypatch.setattr(inventory, "take", known)


def compiled(name: str, checkpointing: bool) -> torch.nn.Module:
    model = disturb(rewrite.compile(HOMES[home(name)](), spec(name), backend="eager"))
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.train()


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("name", sorted(rewrite.methods()))
def test_one_graph(name: str, checkpointing: bool):
    torch.manual_seed(1)
    counters.clear()
    model = compiled(name, checkpointing)
    ids = torch.randint(0, 53, (2, 7), generator=torch.Generator().manual_seed(2))
    if checkpointing and any(g.where == "past" for g in require(model).grafts):  # transformers drops the cache then
        with pytest.raises(rewrite.RewriteError, match="gradient checkpointing drops"):
            model(input_ids=ids, labels=ids)
        return
    trains = any(p.requires_grad for p in model.parameters())
    results = []
    for stance in ("default", "force_eager"):
        with torch.compiler.set_stance(stance):
            cache = {} if home(name) == "encoder" else {"use_cache": False}
            loss = model(input_ids=ids, labels=ids, **cache).loss
        if stance == "default":
            assert counters["stats"]["unique_graphs"] == 1
            assert not counters["graph_break"]
            assert "none in eager" in rewrite.explain(model)
        if trains:
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, found), (expected, wanted) = results
    assert_close(loss, expected)
    if not any(
        p.method.rounds for p in rewrite.plan(HOMES[home(name)](), spec(name)).policies
    ):  # a graph that no partitioner has seen saves what it reads, eager rounds it
        assert_same(found, wanted)
