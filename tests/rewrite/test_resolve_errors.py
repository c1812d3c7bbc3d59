"""Specs that do not fit a model: each with its whole message, caret included; and models that are odd themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from tests.models import assert_close, batch, build, changed, disturb, frozen, step, traces

HAS = (
    "it has: attn, attn.k, attn.o, attn.q, attn.v, base, block, blocks, embed, ffn, ffn.down, ffn.gate, ffn.up, "
    "head, input, linear, norm"
)
NEAR = "nearest: model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj, model.layers.1.mlp.gate_proj"
LLAMA = [
    (
        "lora()@attn.qk",
        "attn.qk",
        "'attn.qk' matches nothing in LlamaForCausalLM",
        "nearest: attn.q (2), attn.k (2), attn.v (2)",
    ),
    (
        "lora()@attn.q,qkv",
        "qkv",
        "'attn.qkv' matches nothing in LlamaForCausalLM",
        "nearest: attn.v (2), attn.q (2), attn.k (2)",
    ),
    ("nf4(base) + lora(r=4)@cross.q", "cross.q", "'cross.q' matches nothing in LlamaForCausalLM", HAS),
    ("lora()@linear-router", "router", "'router' matches nothing in LlamaForCausalLM", HAS),
    (
        "lora()@enc.attn.q",
        "enc.attn.q",
        "'enc.attn.q' matches nothing in LlamaForCausalLM",
        "nearest: attn.q (2), attn.v (2), attn.o (2)",
    ),
    (
        'lora()@"model.layers.*.q_prj"',
        '"model.layers.*.q_prj"',
        "'\"model.layers.*.q_prj\"' matches nothing in LlamaForCausalLM",
        NEAR,
    ),
    ("lora()@attn.q-attn", "attn.q", "'attn.q-attn' selects nothing in LlamaForCausalLM", ""),
    ("lora()@attn.q[7]", "attn.q[7]", "'attn.q[7]': layer 7 is out of range: there are 2 layers", ""),
    ("lora()@attn.q[-3]", "attn.q[-3]", "'attn.q[-3]': layer -3 is out of range: there are 2 layers", ""),
    ("lora()@attn.q[2:]", "attn.q[2:]", "'attn.q[2:]' selects no layer: LlamaForCausalLM has 2", ""),
    ("lora()@head[0]", "head[0]", "'head[0]' asks for layers, but its sites in LlamaForCausalLM have none", ""),
    (
        "lora()@norm",
        "norm",
        "lora cannot stand at 'norm': its sites in LlamaForCausalLM are of kind norm",
        "lora takes: conv, embedding, expert, linear",
    ),
    (
        "nf4(embed)",
        "embed",
        "nf4 cannot stand at 'embed': its sites in LlamaForCausalLM are of kind embedding",
        "nf4 takes: expert, linear",
    ),
    (
        "full(attn) + nf4(attn)",
        "nf4(attn)",
        "'nf4(attn)' and 'full(attn)' cannot share model.layers.0.self_attn.q_proj: a stored weight cannot be trained",
        "",
    ),
    (
        "nf4(ffn) + full(ffn.up)",
        "full(ffn.up)",
        "'full(ffn.up)' and 'nf4(ffn)' cannot share model.layers.0.mlp.up_proj: a stored weight cannot be trained",
        "",
    ),
    (
        "nf4(attn) + nf4(attn.q, block=128)",
        "nf4(attn.q, block=128)",
        "'nf4(attn.q, block=128)' and 'nf4(attn)' cannot share model.layers.0.self_attn.q_proj: "
        "it would be stored twice",
        "",
    ),
    (
        "full(norm) + full(norm)",
        "full(norm)",
        "'full(norm)' and 'full(norm)' cannot share model.layers.0.input_layernorm: it would be trained twice",
        "",
    ),
    (
        "lora(r=33, init=pissa)@attn.k",
        "lora(r=33, init=pissa)@attn.k",
        "lora does not fit model.layers.0.self_attn.k_proj: "
        "r=33 is more than the rank 32 of its weight, which init=pissa needs",
        "",
    ),
    (
        "lora(r=65, init=olora)@ffn",
        "lora(r=65, init=olora)@ffn",
        "lora does not fit model.layers.0.mlp.gate_proj: "
        "r=65 is more than the rank 64 of its weight, which init=olora needs",
        "",
    ),
]
GPT2 = [
    (
        "full(attn.q)",
        "full(attn.q)",
        "full takes whole weights, transformer.h.0.attn.c_attn[q] is a part of one",
        "write attn.qkv",
    ),
    (
        "lora()@attn.q + nf4(attn.q,v)",
        "nf4(attn.q,v)",
        "nf4 takes whole weights, transformer.h.0.attn.c_attn[q] is a part of one",
        "write attn.qkv",
    ),
    (
        "nf4(base, head)",
        "nf4(base, head)",
        "nf4 would replace the weight of lm_head, which transformer.wte shares",
        "leave it out: -head",
    ),
    (
        "lora(r=65, init=pissa)@attn.q",
        "lora(r=65, init=pissa)@attn.q",
        "lora does not fit transformer.h.0.attn.c_attn[q]: "
        "r=65 is more than the rank 64 of its weight, which init=pissa needs",
        "",
    ),
]


def pointing(spec: str, at: str, message: str, hint: str = "") -> str:
    """The message over the spec, with carets under the last `at` in it and the hint behind them."""
    return f"{message}\n  {spec}\n  {' ' * spec.rindex(at)}{'^' * len(at)} {hint}".rstrip()


def refuse(model: nn.Module, spec: str, message: str) -> None:
    """The spec is refused with this message, by the plan and by an attachment, and the model stays as it was."""
    before, flags = frozen(model), [p.requires_grad for p in model.parameters()]
    for act in (rewrite.plan, rewrite.attach, rewrite.compile):
        with pytest.raises(rewrite.ResolveError) as caught:
            act(model, spec)
        assert str(caught.value) == message
        assert isinstance(caught.value, rewrite.Error)
    assert changed(before, frozen(model)) == []
    assert [p.requires_grad for p in model.parameters()] == flags
    assert traces(model) == []


@pytest.mark.parametrize(("spec", "at", "message", "hint"), LLAMA)
def test_llama(spec: str, at: str, message: str, hint: str):
    refuse(build("llama"), spec, pointing(spec, at, message, hint))


@pytest.mark.parametrize(("spec", "at", "message", "hint"), GPT2)
def test_gpt2(spec: str, at: str, message: str, hint: str):
    refuse(build("gpt2"), spec, pointing(spec, at, message, hint))


class Scale(nn.Module):
    """A parameter and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


class Layers(nn.Module):
    """Two layers, whatever they are."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(nn.ReLU(), nn.Dropout())])
def test_a_model_without_parameters(model: nn.Module):
    kind = type(model).__name__
    refuse(
        model,
        "lora(r=4)@linear",
        f"{kind} has no parameters: there is nothing to adapt\n  lora(r=4)@linear\n  ^^^^^^^^^^^^^^^^",
    )


def test_a_model_without_layers():
    refuse(Scale(), "lora()@linear", "'linear' matches nothing in Scale\n  lora()@linear\n         ^^^^^^")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_integer_weights(dtype: torch.dtype):
    def layer() -> nn.Module:
        made = nn.Linear(5, 3, bias=False)
        made.weight = nn.Parameter(torch.zeros(3, 5, dtype=dtype), requires_grad=False)
        return made

    kind = str(dtype).removeprefix("torch.")
    for spec in ("lora(r=2)@linear", "nf4(linear)", "full(linear)"):
        name = spec.partition("(")[0]
        refuse(
            Layers(nn.Linear(4, 5), layer()),
            spec,
            f"second has {kind} weights: {name} needs floating-point ones\n  {spec}\n  {'^' * len(spec)}",
        )
    rewrite.plan(Layers(nn.Linear(4, 5), layer()), 'lora(r=2)@linear-"second"')  # the way out


def tied_layers() -> Any:
    model = Layers(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)).double()
    model.second.weight = model.first.weight
    return model


def test_a_shared_weight_is_not_stored():
    refuse(
        tied_layers(),
        "nf4(linear)",
        "nf4 would replace the weight of first, which second shares\n"
        "  nf4(linear)\n  ^^^^^^^^^^^ leave it out: -linear",
    )


def test_a_shared_weight_with_adapters_is_not_merged():
    model = disturb(rewrite.attach(tied_layers(), "lora(r=2)@linear"))
    x = torch.randn(3, 5, dtype=torch.float64)
    expected, before = model(x), frozen(model)
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.merge(model)
    assert str(caught.value) == (
        "cannot merge lora(r=2) at first: its weight is shared with second, which would change too. Nothing was "
        "merged: rewrite.merge(model, untie=True) gives first a weight of its own"
    )
    assert changed(before, frozen(model)) == []
    assert torch.equal(model(x), expected)
    rewrite.remove(model)
    assert model.second.weight is model.first.weight


def test_a_shared_layer_is_adapted_once_and_merges():
    layer = nn.Linear(5, 5)
    model: Any = Layers(layer, layer).double()
    base = rewrite.plan(model, "lora(r=2)@linear")
    assert [p.site.path for p in base.placements] == ["first"]
    disturb(rewrite.attach(model, "lora(r=2)@linear"))
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = model(x)
    rewrite.merge(model)
    assert model.first is model.second
    assert_close(model(x), expected)
    assert traces(model) == []


TIED = ["full(embed)", "full(head)", "full(embed, head)", "full(head, embed)", "full(embed) + full(head)"]


@pytest.mark.parametrize("spec", TIED)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_tied_weight_trains_once_and_stays_tied(name: str, spec: str):
    changes = {"tie_word_embeddings": True} if name == "llama" else {}
    model: Any = build(name, **changes)
    planned, before = rewrite.plan(model, spec), frozen(model)
    rewrite.attach(model, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 1
    assert sum(p.numel() for p in trained) == planned.trainable
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is trained[0]

    _, gradients = step(model, model, batch(name))
    assert len(gradients) == 1
    disturb(model)
    after = frozen(model)
    rewrite.merge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert changed(after, frozen(model)) == []
    assert changed(before, frozen(model)) != []
    assert traces(model) == []


@pytest.mark.parametrize("spec", TIED)
def test_a_tied_weight_is_restored_once_and_stays_tied(spec: str):
    model: Any = build("gpt2")
    before = frozen(model)
    disturb(rewrite.attach(model, spec))
    assert changed(before, frozen(model)) != []
    rewrite.remove(model)
    assert changed(before, frozen(model)) == []
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_adapter_on_a_tied_head_trains_but_does_not_merge():
    model: Any = disturb(rewrite.attach(build("gpt2"), "lora(r=4)@head"))
    assert len(step(model, model, batch("gpt2"))[1]) == 2
    before = frozen(model)
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.merge(model)
    assert str(caught.value) == (
        "cannot merge lora(r=4) at lm_head: its weight is shared with transformer.wte, which would change too. "
        "Nothing was merged: rewrite.merge(model, untie=True) gives lm_head a weight of its own"
    )
    assert changed(before, frozen(model)) == []


def test_a_tied_head_left_out_is_noted():
    notes = rewrite.plan(build("gpt2"), "lora()@attn.q,v + nf4(base)").notes
    assert notes == ("lm_head is not among base: it shares its weight with transformer.wte; name 'head' to adapt it",)
    assert rewrite.plan(build("gpt2"), "lora()@linear, head").notes == ()
    assert rewrite.plan(build("llama"), "nf4(base)").notes == ()


def test_parts_that_make_a_whole():
    placed = rewrite.plan(build("gpt2"), "nf4(attn)").placements
    assert [p.site.name for p in placed] == [
        f"transformer.h.{i}.attn.{n}" for i in (0, 1) for n in ("c_attn", "c_proj")
    ]


def test_attaching_twice():
    model = rewrite.attach(build("llama"), "lora(r=4)@attn.q")
    before = frozen(model)
    for act in (rewrite.attach, rewrite.compile):
        with pytest.raises(rewrite.RewriteError) as caught:
            act(model, "lora(r=4)@attn.v")
        assert str(caught.value) == "this model is adapted already: rewrite.remove or rewrite.merge it first"
    assert changed(before, frozen(model)) == []


def test_nothing_attached():
    model = build("llama")
    for act in (rewrite.merge, rewrite.remove):
        with pytest.raises(rewrite.RewriteError) as caught:
            act(model)
        assert str(caught.value) == (
            "nothing is attached to this LlamaForCausalLM: call rewrite.attach or compile first"
        )


def test_an_unknown_backend_attaches_nothing():
    model = build("llama")
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.compile(model, "lora()@attn.q", backend="indctor")
    assert str(caught.value) == "unknown backend 'indctor': choose one of inductor, aot_eager, eager"
    assert traces(model) == []


def test_a_module_with_adapters_of_its_own():
    layer = nn.Linear(5, 3)
    layer.adapters = nn.Identity()  # type: ignore[assignment]
    model = Layers(layer, nn.Linear(3, 2))
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.attach(model, "lora(r=2)@linear")
    assert str(caught.value) == "first has an attribute 'adapters' of its own: cannot attach there"
    assert isinstance(layer.adapters, nn.Identity)
    assert all(p.requires_grad for p in model.parameters())
    assert "_rewrite" not in vars(model)


def test_adapters_of_the_model_elsewhere_are_left_alone():
    model: Any = Layers(nn.Linear(5, 3), nn.Linear(3, 2))
    model.adapters = nn.ModuleDict({"mine": nn.Linear(2, 2)})
    before = frozen(model)
    disturb(rewrite.attach(model, "lora(r=2)@linear"))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "mine" in n] == [
        "adapters.mine.adapters.lora.A",
        "adapters.mine.adapters.lora.B",
    ]
    rewrite.remove(model)
    assert changed(before, frozen(model)) == []


class Biases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_bitfit_says_where_there_is_no_bias():
    planned = rewrite.plan(Biases(), "bitfit@linear")
    assert [p.site.path for p in planned.placements] == ["second"]
    assert "trains nothing at 1 of 2 sites" in str(planned)
    with pytest.raises(rewrite.ResolveError, match="none of which has a bias"):
        rewrite.plan(Biases(), 'bitfit@"first"')


def test_biases_train_beside_a_stored_or_a_trained_weight():
    model = rewrite.attach(Biases(), 'bitfit@linear + nf4("first","second")')
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["second.bias"]
    with pytest.raises(rewrite.ResolveError, match="it would be trained twice"):
        rewrite.attach(Biases(), "bitfit@linear + full(linear)")
