"""Invariant 1: an adapted model computes the adapted function whatever Dynamo does, and says when it ran in eager."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rewrite
from rewrite.runtime import captures
from rewrite.runtime.attach import require
from rewrite.runtime.backend import rewrite_backend
from tests.models import ONE_LAYER, SPECS, assert_close, assert_same, batch, build, disturb, gradients, step, traces

EAGER: dict[str, Any] = {"backend": "eager"}
SPEC = SPECS["lora+nf4"]


# Under pytest, which turns warnings into errors, Dynamo's own look at a tensor between two graphs would be one.
between_graphs = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def one_layer(name: str, seed: int = 0) -> Any:
    return build(name, seed=seed, **ONE_LAYER[name])


def compiled(name: str, spec: str = SPEC, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return disturb(rewrite.compile(one_layer(name, seed), spec, **{**EAGER, **settings}), seed=seed + 2)


def assert_equals_eager(model: nn.Module, inputs: dict[str, Any], call: Callable[..., Any] | None = None) -> None:
    """`call` (the model itself by default) has the loss, logits and gradients of `model.forward`."""
    found, found_gradients = step(model, call or model, inputs)
    expected, expected_gradients = step(model, model.forward, inputs)
    assert expected_gradients
    assert_close(found.loss, expected.loss)
    assert_close(found.logits, expected.logits)
    assert_same(found_gradients, expected_gradients)


def adapted(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the model says something else than its base."""
    bare = rewrite.remove(copy.deepcopy(model))
    return not torch.equal(model.forward(**inputs).logits, bare.forward(**inputs).logits)


def test_after_the_recompile_limit(caplog: pytest.LogCaptureFixture):
    model = compiled("small", "lora(r=3)@linear + nf4(base)", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING, logger="rewrite"):
        for tokens in (5, 6, 7):
            inputs = batch("small", tokens=tokens)
            assert adapted(model, inputs)
            assert_equals_eager(model, inputs)
    calls = require(model).calls
    assert (calls.total, calls.eager) == (3, 2)
    said = [r.getMessage() for r in caplog.records if r.name == "rewrite.runtime.fallback"]
    assert len(said) == 1
    assert said[0].startswith("a compiled model ran in eager: Dynamo fell back (recompile limit,")


def test_an_ordinary_session_stays_below_the_limit():
    model = compiled("small", "lora(r=3)@linear", dynamic=False)
    for rows, tokens in [(2, 4), (2, 5), (3, 4), (3, 6), (1, 4), (4, 4)]:
        model(**batch("small", rows, tokens))
        with torch.no_grad():
            model(**batch("small", rows, tokens))
    assert len(captures.records_of(model)) == 12  # Dynamo's own limit is 8
    assert require(model).calls.eager == 0


def test_with_compilation_disabled():
    model, inputs = compiled("llama"), batch("llama")
    with torch._dynamo.config.patch(disable=True):
        assert adapted(model, inputs)
        assert_equals_eager(model, inputs)
    assert (require(model).calls.total, require(model).calls.eager) == (1, 1)
    assert captures.records_of(model) == []


def test_a_deep_copy_has_the_function_and_tensors_of_its_own():
    model, inputs = compiled("llama", "lora(r=4)@attn.q,v + nf4(base) + full(norm)"), batch("llama")
    before = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model.forward(**inputs).logits)
    assert_equals_eager(twin, inputs)
    disturb(twin)
    assert not torch.equal(twin(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}

    rewrite.merge(twin)
    assert torch.equal(model(**inputs).logits, before)  # merging a copy is no business of the original
    rewrite.remove(model)


def test_a_deep_copy_compiles_anew():
    model, inputs = compiled("small", "lora(r=3)@linear + nf4(base)"), batch("small")
    model(**inputs)
    twin = copy.deepcopy(model)
    twin.compile(backend=rewrite_backend, options=EAGER)
    disturb(twin)
    assert_equals_eager(twin, inputs)
    assert_equals_eager(model, inputs)
    assert len(captures.records_of(twin)) == 1
    assert captures.records_of(twin) != captures.records_of(model)


def test_a_part_called_directly():
    model, inputs = compiled("llama"), batch("llama")
    hidden = model.model(inputs["input_ids"]).last_hidden_state
    assert_close(model.lm_head(hidden), model(**inputs).logits)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, dtype=torch.float64)
    lora = layer.adapters["lora"]
    assert_close(layer(x), x @ layer.weight.t() + x @ lora.A.t() @ lora.B.t(), 1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_gradient_checkpointing(name: str):
    model, inputs = compiled(name), batch(name)
    plain, plain_gradients = step(model, model.forward, inputs)
    model.gradient_checkpointing_enable()
    model.train()
    counters.clear()
    checkpointed, checkpointed_gradients = step(model, model, inputs)
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    assert_close(checkpointed.loss, plain.loss)
    (record,) = captures.records_of(model)  # the passes reach into checkpointed regions
    edited = {e.site for e in record.edits if e.rule == "insert"}
    assert edited == {p.site.path for p in rewrite.plan(one_layer(name), SPEC).placements}
    assert record.notes == []
    assert_same(checkpointed_gradients, plain_gradients)
    assert_equals_eager(model, inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_enabled_before_we_attach(reentrant: bool):
    model, inputs = one_layer("llama"), batch("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    plain = disturb(rewrite.attach(one_layer("llama"), SPEC))
    disturb(rewrite.compile(model, SPEC, backend="eager")).train()
    model.load_state_dict(plain.state_dict())
    counters.clear()
    assert_equals_eager(model, inputs)
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    assert_same(step(model, model, inputs)[1], step(plain, plain, inputs)[1])
    rewrite.remove(model)  # the hook and the user's choice are back
    assert traces(model) == []
    assert model.model.embed_tokens(inputs["input_ids"]).requires_grad
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": reentrant}


def test_autocast():
    torch.manual_seed(1)  # a bound on rounding errors of one draw against those of another
    model = disturb(rewrite.compile(build("llama", torch.float32), SPEC, backend="eager"))
    inputs = batch("llama")
    exact, exact_gradients = step(model, model.forward, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager, eager_gradients = step(model, model.forward, inputs)
        found, found_gradients = step(model, model, inputs)
    assert found.logits.dtype == eager.logits.dtype
    assert found_gradients.keys() == eager_gradients.keys()

    def error(tensor: torch.Tensor, reference: torch.Tensor) -> float:
        tensor, reference = tensor.detach().double(), reference.detach().double()
        return float((tensor - reference).norm() / reference.norm())

    # bfloat16 rounds to 1 in 256; the fused operator rounds elsewhere, but not more.
    assert error(found.logits, eager.logits) < 2**-7
    assert error(found.logits, exact.logits) < 1.5 * error(eager.logits, exact.logits)
    for name, gradient in exact_gradients.items():
        assert found_gradients[name].dtype == torch.float32
        assert error(found_gradients[name], gradient) < 1.5 * error(eager_gradients[name], gradient)


def test_two_models_in_one_process():
    first, second, third = compiled("llama"), compiled("gpt2"), compiled("llama", "lora(r=3)@ffn.up", seed=5)
    inputs = {id(m): batch(n) for m, n in ((first, "llama"), (second, "gpt2"), (third, "llama"))}
    for _ in range(2):
        for model in (first, second, third):
            assert_equals_eager(model, inputs[id(model)])
    for model in (first, second, third):
        assert len(captures.records_of(model)) == 1
    rewrite.remove(first)
    assert captures.records_of(first) == []
    assert_equals_eager(second, inputs[id(second)])
    assert_equals_eager(third, inputs[id(third)])
    assert len(captures.records_of(third)) == 1


def test_plain_torch_compile_of_an_attached_model():
    model, inputs = disturb(rewrite.attach(build("llama"), SPEC)), batch("llama")
    call = torch.compile(model, backend=rewrite_backend, options=EAGER, fullgraph=True)
    assert_equals_eager(model, inputs, lambda **kwargs: call(**kwargs))
    (record,) = captures.records_of(model)
    assert {e.rule for e in record.edits} >= {"insert", "batch", "fuse_branch", "fuse_storage"}


@between_graphs
def test_layers_compiled_one_by_one():
    model, inputs = disturb(rewrite.attach(build("llama"), SPEC)), batch("llama")
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.compile(backend=rewrite_backend, options=EAGER, fullgraph=True)
    compiled_step = step(model, model, inputs)
    records = captures.records_of(model)
    assert records
    assert all(any(e.rule == "insert" for e in record.edits) for record in records)
    bare = disturb(rewrite.attach(build("llama"), SPEC))
    bare.load_state_dict(model.state_dict())
    expected = step(bare, bare, inputs)
    assert_close(compiled_step[0].logits, expected[0].logits)
    assert_same(compiled_step[1], expected[1])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_without_adapters_is_left_alone(backend: str):
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3)).double()
    call = torch.compile(model, backend=rewrite_backend, options={"backend": backend}, fullgraph=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    call(x).sum().backward()
    found = gradients(model)
    model(x).sum().backward()
    assert_same(found, gradients(model))
    assert captures.records_of(model) == []


class Broken(nn.Module):
    """A model whose own code breaks the graph between two adapted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@between_graphs
def test_a_graph_break_in_the_model():
    model = disturb(rewrite.compile(Broken().double(), "lora(r=2)@linear", backend="eager"))
    x = torch.randn(4, 7, dtype=torch.float64)
    model(x).sum().backward()
    found = gradients(model)
    expected = model.forward(x)
    expected.sum().backward()
    assert_close(model(x), expected)
    assert_same(found, gradients(model))
    sites = [[e.site for e in r.edits if e.rule == "insert"] for r in captures.records_of(model)]
    assert sites == [["first"], ["second"]]
    assert require(model).calls.eager == 0  # both parts were compiled


def test_training_and_evaluation_take_turns():
    model, inputs = compiled("small", "lora(r=4, dropout=0.5)@linear"), batch("small")
    for training in (True, False, True, False):
        model.train(training)
        torch.manual_seed(4)
        found, found_gradients = step(model, model, inputs)
        torch.manual_seed(4)
        expected, expected_gradients = step(model, model.forward, inputs)
        assert_close(found.logits, expected.logits)
        assert_same(found_gradients, expected_gradients)
    assert len(captures.records_of(model)) == 2


def test_inference_mode_and_no_grad():
    model, inputs = compiled("llama"), batch("llama")
    expected = model.forward(**inputs).logits
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(model(**inputs).logits.clone(), expected)
