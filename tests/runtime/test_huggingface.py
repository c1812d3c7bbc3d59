"""An adapted Hugging Face model under generate, Trainer and accelerate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import rewrite
from rewrite.runtime import captures
from tests.models import VOCABULARY, batch, build, changed, disturb, frozen, step

SPEC = "lora(r=4)@attn.q,v"
FILES = {"adapter.safetensors", "rewrite.json"}


def adapted(name: str, spec: str = SPEC, compile: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = build(name, dtype)
    model = rewrite.compile(model, spec, backend="eager") if compile else rewrite.attach(model, spec)
    return disturb(model, 0.3)


def tokens(model: Any, name: str) -> torch.Tensor:
    """Eight greedy tokens after each of two prompts."""
    torch._dynamo.reset()
    ids = batch(name)["input_ids"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.eval().generate(ids, attention_mask=torch.ones_like(ids), **settings)


@pytest.mark.parametrize("spec", [SPEC, "lora(r=4)@attn.q,v + nf4(base)"], ids=["lora", "lora+nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate_equals_the_merged_model(name: str, spec: str):
    model = adapted(name, spec, dtype=torch.float64)
    found = tokens(model, name)
    base = tokens(build(name), name)
    assert not torch.equal(found, base)
    assert torch.equal(found, tokens(rewrite.merge(model), name))


def test_generate_compiled_equals_the_merged_model():
    model = adapted("llama", compile=True, dtype=torch.float64)
    found = tokens(model, "llama")
    assert len(captures.records_of(model)) >= 1
    assert torch.equal(found, tokens(rewrite.merge(model), "llama"))


class Text(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards: something to learn."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 8) % (VOCABULARY - 3) + 3
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=10,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=Text())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_trainer_trains_and_saves_the_adapter_alone(compile: bool, tmp_path: Path):
    model = rewrite.attach(build("llama", torch.float32), SPEC + " + full(norm)")
    if compile:
        rewrite.remove(model)
        rewrite.compile(model, SPEC + " + full(norm)", backend="eager")
    frozen_before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert changed(frozen_before, {n: p.detach() for n, p in model.named_parameters() if n in frozen_before}) == []

    run.save_model(str(tmp_path / "last"))
    for folder in (tmp_path / "checkpoint-10", tmp_path / "checkpoint-20", tmp_path / "last"):
        files = {file.name for file in folder.iterdir()}
        assert files >= FILES
        assert not {f for f in files if f.startswith(("model", "pytorch_model", "config", "generation_config"))}
        assert (folder / "adapter.safetensors").stat().st_size < 30_000
    loaded = rewrite.load(build("llama", torch.float32), tmp_path / "last")
    assert changed(frozen(loaded), frozen(model)) == []
    assert json.loads((tmp_path / "last" / "rewrite.json").read_text())["model"] == "LlamaForCausalLM"


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_trainer_with_gradient_checkpointing(compile: bool, tmp_path: Path):
    spec = "lora(r=4)@attn.q,v + nf4(base)"
    model = build("llama", torch.float32)
    rewrite.compile(model, spec, backend="eager") if compile else rewrite.attach(model, spec)
    run = trainer(model, tmp_path, gradient_checkpointing=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert all(math.isfinite(loss) for loss in losses)
    assert len(captures.records_of(model)) == compile


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_accelerate_prepares_and_trains(compile: bool):
    model = adapted("llama", compile=compile)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    inputs, losses = batch("llama"), []
    for _ in range(5):
        loss = prepared(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert accelerator.unwrap_model(prepared) is model


def test_save_pretrained_saves_the_adapter_until_merged(tmp_path: Path):
    model = adapted("llama")
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == FILES
    expected = step(model, model, batch("llama"))[0].logits
    rewrite.merge(model).save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(**batch("llama")).logits, expected)


def test_an_adapted_model_stays_what_it_was():
    base, model = build("llama"), adapted("llama", "lora(r=4)@attn.q,v + nf4(base)", compile=True)
    assert type(model) is type(base)
    assert model.config is not None
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}
    assert model(**batch("llama")).logits.dtype == torch.float64


def test_resized_embeddings_and_buffers_are_left_alone():
    model = adapted("llama")
    model.resize_token_embeddings(VOCABULARY + 4)
    assert model(**batch("llama")).logits.shape[-1] == VOCABULARY + 4
    rewrite.remove(model)
    assert model.lm_head.weight.shape == (VOCABULARY + 4, 64)
