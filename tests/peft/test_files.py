"""Files that do not fit, adapters that PEFT cannot hold, and where PEFT computes something else than it should."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

import rewrite  # noqa: E402
from rewrite.errors import RewriteError  # noqa: E402
from rewrite.peft import AsInPeft, named_parameters  # noqa: E402
from tests.models import assert_close, disturb  # noqa: E402
from tests.peft.harness import adapted, gradients_of_peft, loaded, quiet, run  # noqa: E402
from tests.peft.models import batch, build  # noqa: E402

DOUBLE = torch.float64


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})


def folder_of(name: str, config: Any, place: Path) -> Path:
    with quiet():
        adapted(name, config, DOUBLE).save_pretrained(place)
    return place


def test_all_problems_of_a_file_are_listed_and_nothing_is_loaded(tmp_path: Path):
    place = folder_of("mlp", lora(target_modules=["lin0", "lin1"]), tmp_path)
    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lin0.lora_A.weight"]
    tensors["base_model.model.lin0.lora_C.weight"] = torch.zeros(1)
    tensors["base_model.model.lin1.lora_A.weight"] = torch.zeros(5, 20)
    save_file(tensors, file)
    model = build("mlp", DOUBLE)
    with pytest.raises(RewriteError) as caught:
        rewrite.load_peft(model, place)
    text = str(caught.value)
    assert "missing  base_model.model.lin0.lora_A.weight (4, 10)" in text
    assert "extra    base_model.model.lin0.lora_C.weight (1,)" in text
    assert "shape    base_model.model.lin1.lora_A.weight: file (5, 20), model (4, 20)" in text
    assert not any(p.requires_grad is False for p in model.parameters())
    rewrite.attach(model, "lora@linear")  # it is bare still


def test_a_second_adapter_is_refused(tmp_path: Path):
    place = folder_of("mlp", lora(target_modules=["lin0"]), tmp_path)
    model = rewrite.load_peft(build("mlp", DOUBLE), place)
    with pytest.raises(RewriteError, match="adapted already"):
        rewrite.load_peft(model, place)


def test_another_base_than_the_file_has_is_refused(tmp_path: Path):
    place = folder_of("llama", lora(target_modules=["embed_tokens"]), tmp_path)
    other = build("llama", DOUBLE)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(RewriteError, match=r"another base weight model\.embed_tokens\.weight"):
        rewrite.load_peft(other, place)


def test_old_files_are_read(tmp_path: Path):
    place = folder_of("mlp", lora(target_modules=["lin0"]), tmp_path)
    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    expected = run(rewrite.load_peft(build("mlp", DOUBLE), place), batch("mlp", DOUBLE))[0]
    torch.save(tensors, place / "adapter_model.bin")
    file.unlink()
    assert_close(run(rewrite.load_peft(build("mlp", DOUBLE), place), batch("mlp", DOUBLE))[0], expected, 0)


UNSAVABLE = [
    ("gpt2", "lora@attn.q", "part of transformer.h.0.attn.c_attn"),
    ("mlp", "lora@'lin0' + ia3@'lin1'", "one method in a folder"),
    ("mlp", "en: lora@'lin0' + fr: lora@'lin1'", "several names"),
    ("mlp", "lora@'lin0' + lora(r=2)@'lin0'", "two adapters"),
    ("mlp", "lora(dropout=0.1)@'lin0' + lora@'lin1'", "one lora_dropout in a folder"),
    ("mlp", "lora@'lin0' + bitfit@'lin1'", "all biases, or those of the adapted layers"),
    ("grouped conv2", "lora@'conv'", "with groups"),
    ("mlp", "hira(r=2)@'lin0' + hira(r=4)@'lin1'", "one r in a folder"),
    ("nested", "fourierft(n=8)@'2.0' + fourierft(n=9)@'0'", "no n_frequency_pattern that says 8 at 2.0"),
    ("mha", "lora@'mha.out_proj'", "all of nn.MultiheadAttention"),
    ("mha", "lora(r=4)@'mha.in_proj_weight' + lora(r=2)@'mha.out_proj'", "one rank"),
    ("mlp", "lora_xs(r=4)@'lin0'", "PEFT has no file for"),
    ("mlp", "bitfit@linear,norm", "beside an adapter only"),
]


@pytest.mark.parametrize(("name", "spec", "message"), UNSAVABLE)
def test_what_peft_cannot_hold_is_refused(name: str, spec: str, message: str, tmp_path: Path):
    model = rewrite.attach(build(name, DOUBLE), spec)
    with pytest.raises(RewriteError, match=message):
        rewrite.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAVED = [
    ("llama", "lora(r=4, alpha=8)@attn.q,v + lora(r=2)@ffn.down + full(head)"),
    ("llama", "lora(r=4, init=pissa)@attn"),
    ("llama", "dora(r=4)@attn.q + nf4(attn.q)"),
    ("mha", "lora(r=4)@'mha'"),
    ("mha", "lora(r=4, alpha=12)@'mha.in_proj_weight' + lora(r=4, alpha=2)@'mha.out_proj'"),
    ("qwen3_moe", "lora(r=4)@'*.experts'"),
    ("words", "lora(r=4)@linear,'emb'"),
    ("mlp", "norm(norm) + full('head')"),
    ("mha", "lora(r=4)@'lin0' + full('mha')"),
]


@pytest.mark.parametrize(("name", "spec"), SAVED)
def test_what_was_trained_here_is_the_same_function_in_peft(name: str, spec: str, tmp_path: Path):
    model = disturb(rewrite.attach(build(name, torch.float32), spec), 0.05).eval()
    rewrite.save_peft(model, tmp_path)
    base = build(name, torch.float32)
    if "nf4" in spec:  # the base's matter
        base = quantised(base)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    inputs = batch(name, torch.float32)
    assert_close(run(theirs, inputs)[0], run(model, inputs)[0], 2e-5)


def quantised(base: Any) -> Any:
    """The base with the weights that nf4 stores, as plain ones."""
    stored = rewrite.attach(copy.deepcopy(base), "nf4(attn.q)")
    with torch.no_grad():
        for path, module in base.named_modules():
            if path.endswith("q_proj"):
                module.weight.copy_(stored.get_submodule(path).weight)
    return base


def test_parameters_under_the_names_of_peft_are_ours(tmp_path: Path):
    model = loaded(adapted("conv2", lora(target_modules=["conv"]), DOUBLE), "conv2", DOUBLE, tmp_path)
    found = dict(named_parameters(model))
    A = found["base_model.model.conv.lora_A.weight"]
    assert isinstance(A, AsInPeft)
    assert A.shape == (4, 4, 3, 2)
    assert A.grad is None
    run(model, batch("conv2", DOUBLE))[1].backward()
    assert A.grad is not None
    before = A.detach().clone()
    torch.optim.SGD(found.values(), lr=0.1).step()
    assert_close(A.detach(), before - 0.1 * A.grad, 1e-12)
    held = model.conv.adapters.lora.A
    assert_close(held.detach().view_as(A), A.detach(), 0)
    A.grad = None
    assert held.grad is None


# --- where PEFT 0.21 is wrong ---


def test_peft_adds_the_update_of_an_attention_output_twice(tmp_path: Path):
    """Its forward merges out_proj twice; that is the function that was trained, and its gradient is half of it."""
    theirs = adapted("mha", lora(target_modules=["mha", "lin0"]), DOUBLE)
    ours = loaded(theirs, "mha", DOUBLE, tmp_path).eval()
    for model in (ours, theirs):
        logits, loss = run(model, batch("mha", DOUBLE))
        loss.backward()
    assert_close(run(ours, batch("mha", DOUBLE))[0], logits, 1e-9)
    expected = gradients_of_peft(theirs)
    for name, parameter in named_parameters(ours):
        assert parameter.grad is not None
        factor = 2 if "out_proj" in name else 1
        assert_close(parameter.grad, factor * expected[name], 1e-9, name)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in rewrite.merge(ours).named_parameters():
        assert_close(parameter.detach(), merged[name].detach(), 1e-9, name)


def test_the_bias_of_an_adapted_attention_is_that_of_its_output(tmp_path: Path):
    theirs = adapted("mha", lora(target_modules=["mha", "lin0"], bias="lora_only"), DOUBLE)
    ours = loaded(theirs, "mha", DOUBLE, tmp_path / "theirs").eval()
    for model in (ours, theirs):
        logits, loss = run(model, batch("mha", DOUBLE))
        loss.backward()
    assert_close(run(ours, batch("mha", DOUBLE))[0], logits, 1e-9)
    expected = gradients_of_peft(theirs)
    mine = dict(named_parameters(ours))
    assert sorted(mine) == sorted(expected)
    name = "base_model.model.mha.base_layer.out_proj.base_layer.bias"
    assert mine[name].grad is not None
    assert_close(mine[name].grad, expected[name], 1e-9)
    rewrite.save_peft(ours, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(build("mha", DOUBLE), str(tmp_path / "ours")).eval()
    assert_close(run(again, batch("mha", DOUBLE))[0], logits, 1e-9)
    assert again.peft_config["default"].bias == "lora_only"


def test_peft_passes_a_wrong_gradient_through_c3a(tmp_path: Path):
    """Its backward convolves the gradient of the input the other way round: right only for blocks of two."""
    theirs = adapted("mlp", peft.C3AConfig(block_size=5, target_modules=["lin0"]), torch.float32)
    ours = loaded(theirs, "mlp", torch.float32, tmp_path)
    gradients = []
    for model in (ours, theirs):
        inputs = batch("mlp", torch.float32)
        run(model, inputs)[1].backward()
        gradients.append(inputs["x"].grad)
    merged = copy.deepcopy(theirs).merge_and_unload()
    inputs = batch("mlp", torch.float32)
    run(merged, inputs)[1].backward()
    assert_close(gradients[0], inputs["x"].grad, 1e-5)
    assert float((gradients[1] - gradients[0]).abs().max()) > 1e-3 * float(gradients[0].abs().max())


def test_peft_has_a_wrong_gradient_for_kernels_in_loha(tmp_path: Path):
    """With use_effective_conv2d, its backward of hada_w1_a takes the factors of the other product."""
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=["conv"], use_effective_conv2d=True)
    theirs = adapted("conv2", config, DOUBLE)
    ours = loaded(theirs, "conv2", DOUBLE, tmp_path)
    for model in (ours, theirs):
        run(model, batch("conv2", DOUBLE))[1].backward()
    mine: dict[str, Any] = {k: p.grad for k, p in named_parameters(ours)}
    expected = gradients_of_peft(theirs)
    name = "base_model.model.conv.hada_w1_a"
    assert float((mine[name] - expected[name]).abs().max()) > 0.1 * float(expected[name].abs().max())
    parameter, step = dict(named_parameters(ours))[name], 1e-6
    with torch.no_grad():
        parameter[1, 2] += step
        up = run(ours, batch("conv2", DOUBLE))[1]
        parameter[1, 2] -= 2 * step
        down = run(ours, batch("conv2", DOUBLE))[1]
    assert abs(float((up - down) / (2 * step) - mine[name][1, 2])) < 1e-6 * float(mine[name].abs().max())


def test_the_loss_of_adalora_takes_its_regulariser(tmp_path: Path):
    """PEFT adds it by itself where it knows the task."""
    settings = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    theirs = adapted("llama", peft.AdaLoraConfig(**settings), DOUBLE)
    ours = loaded(theirs, "llama", DOUBLE, tmp_path)
    inputs = batch("llama", DOUBLE)
    (logits, loss), (expected, whole) = run(ours, inputs), run(theirs, inputs)
    assert_close(logits, expected, 1e-9)
    assert_close(loss.double() + rewrite.regulariser(ours), whole.double(), 1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
        ),
    ],
    ids=["prompt", "ptuning", "prefix", "projected prefix"],
)
def test_virtual_tokens_equal_peft(name: str, config: Any, tmp_path: Path):
    theirs = adapted(name, config, torch.float32)
    ours = loaded(theirs, name, torch.float32, tmp_path / "theirs").eval()
    inputs = batch(name, torch.float32)
    (logits, loss), (expected, other) = run(ours, inputs), run(theirs, inputs)
    assert_close(logits, expected, 1e-5)
    assert_close(loss, other, 1e-5)
    rewrite.save_peft(ours, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(build(name, torch.float32), str(tmp_path / "ours")).eval()
    assert_close(run(again, inputs)[0], expected, 1e-5)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["num_virtual_tokens"] == 3
