"""Losses in chunks on whole models: equal to eager, logits that are there when they are read, and a way out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import rewrite
from rewrite.errors import RewriteError
from rewrite.finetune.bases import built_in_config
from rewrite.runtime import captures
from rewrite.runtime.backend import rewrite_backend
from rewrite.runtime.compiled import compile_model
from rewrite.runtime.lazy_logits import LazyLogits
from tests.models import ONE_LAYER, assert_close, assert_same, batch, build, disturb, gradients, in_own_dtype, step

Tensor = torch.Tensor
LORA = "lora(r=3)@attn.q,v"


def compiled(name: str, spec: str = LORA, backend: str = "eager", dtype: torch.dtype = torch.float64, **options: Any):
    """A compiled model, adapters moved."""
    model = disturb(rewrite.attach(build(name, dtype, **ONE_LAYER[name]), spec))
    return compile_model(model, backend, True, **options)


def rules(model: nn.Module) -> set[str]:
    return {e.rule for r in captures.records_of(model) for e in r.edits} & {"chunk_loss", "defer_logits"}


SPECS = {
    "head frozen": LORA,
    "head adapted": "lora(r=3)@attn.q,head",
    "head trains": f"{LORA} + full(head)",
    "head stored": f"{LORA} + nf4(base)",
}


MODELS = [("llama", spec) for spec in SPECS] + [
    ("gpt2", "head trains"),
    ("t5", "head adapted"),
    ("qwen3", "head frozen"),
]


@pytest.mark.parametrize(("name", "kind"), MODELS, ids=[f"{name}, {kind}" for name, kind in MODELS])
def test_equals_eager_and_the_logits_are_there(name, kind):
    model, given = compiled(name, SPECS[kind]), batch(name, 4, 60)
    expected, wanted = step(model, model.forward, given)
    output, found = step(model, model, given)
    assert rules(model) == {"chunk_loss", "defer_logits"}
    assert isinstance(output.logits, LazyLogits)
    assert output.logits.shape == expected.logits.shape
    assert output.logits.dtype == expected.logits.dtype
    assert_close(output.loss, expected.loss)
    assert_same(found, wanted)
    assert_close(output.logits.detach() + 0, expected.logits)


def test_equals_eager_through_aot_autograd():
    model, given = compiled("gpt2", f"{LORA} + full(head)", "aot_eager"), batch("gpt2", 4, 60)
    expected, wanted = step(model, model.forward, given)
    output, found = step(model, model, given)
    assert isinstance(output.logits, LazyLogits)
    assert_close(output.loss, expected.loss)
    assert_same(found, wanted)
    assert_close(output.logits + 0, expected.logits)
    (record,) = captures.records_of(model)
    vocabulary = output.logits.shape[-1]
    assert all(vocabulary not in s["shape"] or s["shape"][0] == vocabulary for s in record.counts["saved"])


def test_equals_eager_through_inductor():
    model, given = compiled("llama", "lora(r=3)@attn.q,head", "inductor", torch.float32), batch("llama")
    expected, wanted = step(model, model.forward, given)
    output, found = step(model, model, given)
    assert isinstance(output.logits, LazyLogits)
    assert_close(output.loss, expected.loss, 1e-6)
    assert_same(found, wanted, 1e-5)
    assert_close(output.logits + 0, expected.logits, 1e-5)


def test_a_small_classifier_is_left():
    model, given = compiled("bert"), batch("bert")
    output, _ = step(model, model, given)
    assert rules(model) == set()
    assert not isinstance(output.logits, LazyLogits)
    assert "full logits: 2 rows of 2 logits take no more than the gradients" in rewrite.explain(model)


def test_explain_shows_the_edits():
    model = compiled("llama")
    model(**batch("llama"))
    text = rewrite.explain(model)
    assert "chunk_loss x1" in text
    assert "defer_logits x1 at lm_head" in text
    assert "return x; the logits are computed when they are read" in str(rewrite.diff(model))


def test_a_codec_of_activations_leaves_the_gradient():
    model, given = compiled("llama", f"{LORA} + save(int8)", "aot_eager"), batch("llama", 4, 32)
    step(model, model, given)
    assert "saved as it is, 65,536 bytes at (model): it is a gradient" in rewrite.explain(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_model_of_finetune(backend):
    """The built-in model with real sizes, in float64, against the model that nothing was done to."""
    torch.manual_seed(0)
    config = built_in_config()
    config.num_hidden_layers = 2
    model = in_own_dtype(transformers.LlamaForCausalLM(config).double())
    compile_model(disturb(rewrite.attach(model, "lora(r=8)@attn.q,v,head")), backend, True)
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(64) < 11, -100)
    output, found = step(model, model, {"input_ids": ids, "labels": labels})
    expected, wanted = step(model, model.forward, {"input_ids": ids, "labels": labels})
    assert rules(model) == {"chunk_loss", "defer_logits"}
    assert_close(output.loss, expected.loss, 1e-14)
    assert_same(found, wanted, 1e-12)


def test_the_way_out():
    model = disturb(rewrite.compile(build("llama", **ONE_LAYER["llama"]), LORA, backend="eager", chunked_loss=False))
    output, found = step(model, model, batch("llama"))
    expected, wanted = step(model, model.forward, batch("llama"))
    assert rules(model) == set()
    assert type(output.logits) is Tensor
    assert torch.equal(output.loss, expected.loss)
    assert_same(found, wanted)
    call = torch.compile(model, backend=rewrite_backend, options={"backend": "eager", "chunked_loss": False})
    assert type(call(**batch("llama")).logits) is Tensor


def test_inference_computes_its_logits():
    model = compiled("llama")
    with torch.no_grad():
        output = model(**batch("llama"))
        assert type(output.logits) is Tensor
        assert_close(output.loss, model.forward(**batch("llama")).loss)
    assert rules(model) == set()


@pytest.fixture
def pair() -> tuple[nn.Module, dict[str, Tensor]]:
    """A compiled model whose head trains a little, and its batch."""
    return compiled("llama", "lora(r=3)@attn.q,head"), batch("llama")


READS = {
    "argmax": lambda z: z.argmax(-1),
    "slice": lambda z: z[:, -1, 3:7],
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "list": lambda z: torch.tensor(z.tolist(), dtype=z.dtype),
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.bfloat16) * 1,
    "half, then wide": lambda z: z.half().double() + 0,
    "detach": lambda z: z.detach() * 1,
    "cross entropy": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(18)),
    "concatenation": lambda z: torch.cat([z, z]),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "iteration": lambda z: torch.stack(list(z)),
    "in place": lambda z: z.clone().add_(1),
    "operator": lambda z: 2 * z - z / 3,
    "out of functions' sight": lambda z: Double.apply(z),
}


class Double(torch.autograd.Function):
    """Sees a tensor below `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.ops.aten.mul.Tensor(z, 2.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2.0 * gradients[0]


def test_reading(pair):
    model, given = pair
    for name, read in READS.items():
        lazy, plain = model(**given).logits, model.forward(**given).logits
        found, expected = read(lazy), read(plain)
        narrow = found.dtype.itemsize < 8
        assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad), name
        assert_close(found.double() + 0, expected.double(), 1e-6 if narrow else 1e-12, name)
        if expected.requires_grad:
            (found.double() ** 2).sum().backward()
            ours = gradients(model)
            (expected.double() ** 2).sum().backward()
            assert_same(ours, gradients(model), 1e-5 if narrow else 1e-9)


def test_metadata_computes_nothing(pair):
    model, given = pair
    lazy, plain = model(**given).logits, model.forward(**given).logits
    assert (lazy.shape, lazy.dtype, lazy.device) == (plain.shape, plain.dtype, plain.device)
    assert (lazy.size(-1), lazy.dim(), lazy.numel(), len(lazy)) == (100, 3, plain.numel(), 2)
    assert lazy.requires_grad
    assert lazy.float().dtype is torch.float32
    assert not lazy.detach().requires_grad
    assert lazy.made is None


def test_read_once_and_without_gradients_first(pair):
    model, given = pair
    lazy, plain = model(**given).logits, model.forward(**given).logits
    with torch.no_grad():
        assert torch.equal(lazy.argmax(-1), plain.argmax(-1))
    made = lazy.made
    assert made is not None
    with torch.inference_mode():
        assert torch.equal(lazy.argmax(-1), plain.argmax(-1))
    lazy.square().mean().backward()
    assert lazy.made is made
    assert gradients(model)


def test_distillation_through_loss_and_logits():
    """Both outputs of one graph have a gradient."""
    model, given = compiled("gpt2", "lora(r=3)@attn.q,head", "aot_eager"), batch("gpt2")
    teacher = torch.randn(2, 9, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def both(call: Any) -> dict[str, Tensor]:
        output = call(**given)
        (output.loss + (output.logits - teacher).square().mean()).backward()
        return gradients(model)

    assert_same(both(model), both(model.forward))


def test_a_head_that_has_changed_is_an_error(pair):
    model, given = pair
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(**given)
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RewriteError, match=r"read them before optimizer\.step\(\)"):
        output.logits.argmax(-1)


def test_a_frozen_head_may_be_read_after_the_step():
    model, given = compiled("llama"), batch("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    expected = model.forward(**given).logits
    output = model(**given)
    output.loss.backward()
    optimizer.step()
    assert_close(output.logits + 0, expected)


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the forward"])
def test_autocast(inside):
    model, given = compiled("llama", "lora(r=3)@attn.q,head", dtype=torch.float32), batch("llama")
    if inside:  # as `accelerate` does
        forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        output, expected = model(**given), model.forward(**given)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output, expected = model(**given), model.forward(**given)
    assert isinstance(output.logits, LazyLogits)
    assert output.logits.dtype == expected.logits.dtype
    assert output.loss.dtype == expected.loss.dtype
    assert_close(output.logits + 0, expected.logits, 2**-6)
    assert_close(output.loss, expected.loss, 2**-8)


def test_dynamic_sizes_in_one_graph():
    model = compiled("llama", backend="aot_eager")
    for rows, tokens in ((2, 9), (3, 7), (5, 4)):
        given = batch("llama", rows, tokens)
        output, found = step(model, model, given)
        expected, wanted = step(model, model.forward, given)
        assert_close(output.loss, expected.loss)
        assert_same(found, wanted)
        assert_close(output.logits + 0, expected.logits)
    assert len(captures.records_of(model)) == 1


def test_gradient_checkpointing():
    model, given = compiled("llama"), batch("llama")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    output, found = step(model, model, given)
    assert isinstance(output.logits, LazyLogits)
    _, wanted = step(model, model.forward, given)
    assert_same(found, wanted)


# Dynamo asks every input for its gradient, which a tensor that has been computed warns of.
enters_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@enters_dynamo
def test_logits_that_enter_another_compiled_function(pair):
    model, given = pair
    lazy, plain = model(**given).logits, model.forward(**given).logits
    call = torch.compile(lambda z: z.log_softmax(-1).square().sum(), backend="eager")
    found = call(lazy)
    assert_close(found, call(plain))
    found.backward()
    ours = gradients(model)
    call(plain).backward()
    assert_same(ours, gradients(model))


@enters_dynamo
def test_a_graph_break_after_the_model():
    model, given = (
        disturb(rewrite.attach(build("llama", **ONE_LAYER["llama"]), "lora(r=3)@attn.q,head")),
        batch("llama"),
    )

    def accuracy(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = model(input_ids=input_ids, labels=labels)
        torch._dynamo.graph_break()
        return output.loss, output.logits.square().mean()

    call = torch.compile(accuracy, backend=rewrite_backend, options={"backend": "eager"})
    found, expected = call(**given), accuracy(**given)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert "a graph break follows" in rewrite.explain(model)
