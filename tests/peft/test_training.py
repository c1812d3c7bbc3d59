"""Adapters of a spec, by roles, beside HF PEFT's: dropout, compiled, where they start, parts of fused projections."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rewrite
from tests.models import Output, assert_close, assert_same, batch, build, disturb, gradients

peft = pytest.importorskip("peft")

QV = {
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
ALL_LINEAR = {
    "llama": r".*_proj",
    "qwen3": r".*_proj",
    "gpt2": r".*\.(c_attn|c_proj|c_fc)",
    "bert": r".*\.(query|key|value|dense)",
    "vit": r"vit\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
    "t5": r".*\.(q|k|v|o|wi|wo)",
}

CASES = [
    ("llama", "lora(r=4)@attn.q,v", {"r": 4, "target_modules": QV["llama"]}),
    ("gpt2", "lora(r=4)@attn.qkv", {"r": 4, "target_modules": ["c_attn"]}),
    ("t5", "lora(r=4)@linear-cross-head", {"r": 4, "target_modules": r"(?!.*EncDec).*\.(q|k|v|o|wi|wo)"}),
    ("vit", "lora(r=3)@linear-head", {"r": 3, "target_modules": ALL_LINEAR["vit"]}),
    ("llama", "lora(r=4)@attn.q[1:],v[1:]", {"r": 4, "target_modules": QV["llama"], "layers_to_transform": [1]}),
    ("llama", "lora(r=4, dropout=0.3)@linear-head", {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}),
    ("gpt2", "lora(r=4, dropout=0.3)@linear-head", {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}),
]
INITS = [
    ("llama", "pissa", {"target_modules": r".*_proj"}),
    ("qwen3", "olora", {"target_modules": r".*_proj"}),
    ("bert", "pissa", {"target_modules": ALL_LINEAR["bert"]}),
    ("gpt2", "pissa", {"target_modules": ALL_LINEAR["gpt2"]}),
]


def peft_model(name: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    model = build(name, dtype)
    fan_in = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = peft.get_peft_model(model, peft.LoraConfig(**{"lora_alpha": settings["r"], **settings, **fan_in}))
    for layers in [m.lora_dropout for m in model.modules() if hasattr(m, "lora_dropout")]:
        layers.default = Dropout(settings["lora_dropout"]) if settings.get("lora_dropout") else layers.default
    return model


class Dropout(nn.Module):
    """Theirs with our random numbers."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.rewrite.dropout(x, torch.ops.rewrite.draw(x), self.p) if self.training else x


def peft_name(ours: str) -> str:
    """Where PEFT keeps one of our parameters."""
    found = re.fullmatch(r"(.*)\.adapters\.\w+\.(A|B|c)", ours)
    if found is None:
        path, _, leaf = ours.rpartition(".")
        return f"base_model.model.{path}.modules_to_save.default.{leaf}"
    path, slot = found.groups()
    kind = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "c": "lora_B.default.bias"}[slot]
    return f"base_model.model.{path}.{kind}"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """PEFT's trained tensors into ours; fails where one of the two trains what the other does not."""
    source = trained(theirs)
    names = {peft_name(name): p for name, p in trained(ours).items()}
    assert names.keys() == source.keys()
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(source[name])


def assert_equal(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Any], tolerance: float) -> None:
    outputs, found = [], []
    for model in (ours, theirs):
        torch.manual_seed(6)  # of the dropout
        output = model.train()(**inputs)
        output.loss.backward()
        outputs.append(output)
        found.append(gradients(model))
    assert_close(outputs[0].logits, outputs[1].logits, tolerance)
    assert_close(outputs[0].loss, outputs[1].loss, tolerance)
    assert_same({peft_name(name): g for name, g in found[0].items()}, found[1], tolerance)
    assert all(bool(gradient.any()) for gradient in found[0].values())


@pytest.mark.parametrize(("name", "spec", "settings"), CASES)
def test_equals_peft(name: str, spec: str, settings: dict[str, Any]):
    theirs = disturb(peft_model(name, torch.float64, **settings))
    ours = rewrite.attach(build(name), spec)
    copy_weights(ours, theirs)
    assert_equal(ours, theirs, batch(name), 1e-12)


@pytest.mark.parametrize(("name", "spec", "settings"), [CASES[0], CASES[1]])
def test_compiled_equals_peft(name: str, spec: str, settings: dict[str, Any]):
    theirs = disturb(peft_model(name, torch.float64, **settings))
    ours = rewrite.compile(build(name), spec, backend="aot_eager")
    copy_weights(ours, theirs)
    assert_equal(ours, theirs, batch(name), 1e-12)


@pytest.mark.parametrize(("name", "init", "settings"), INITS)
def test_initialisation_equals_peft(name: str, init: str, settings: dict[str, Any]):
    # PEFT takes B A off the base weight and refuses float64 here; the function is the same.
    theirs = peft_model(name, torch.float32, r=6, lora_alpha=9, init_lora_weights=init, **settings)
    ours = rewrite.attach(build(name, torch.float32), f"lora(r=6, alpha=9, init={init})@linear-head")
    source = trained(theirs)
    factors = {peft_name(n): p for n, p in trained(ours).items()}
    assert factors.keys() == source.keys()
    for key in [k for k in factors if "lora_A" in k]:  # singular vectors have no sign of their own
        other = key.replace("lora_A", "lora_B")
        assert_close(factors[other] @ factors[key], source[other] @ source[key], 1e-5, key)

    buffers = dict(ours.named_buffers())
    for path, parameter in trained(ours).items():
        buffers[f"{path}0"].copy_(source[peft_name(path)].detach())  # where PEFT starts, and what it took off
        assert buffers[f"{path}0"].shape == parameter.shape
    disturb(theirs)
    copy_weights(ours, theirs)
    inputs = batch(name, dtype=torch.float32)
    assert_equal(ours, theirs, inputs, 1e-4)


def test_a_part_of_a_fused_projection_is_peft_on_the_whole_of_it():
    # PEFT cannot name attn.q in c_attn: its q,k,v share one A.  Ours with that A three times is the same function.
    theirs = disturb(peft_model("gpt2", torch.float64, r=4, target_modules=["c_attn"]))
    ours = rewrite.attach(build("gpt2"), "lora(r=4)@attn.q,k,v")
    source = trained(theirs)
    with torch.no_grad():
        for name, parameter in trained(ours).items():
            path, part, slot = re.fullmatch(r"(.*)\.adapters\.lora_([qkv])\.([AB])", name).groups()  # type: ignore[union-attr]
            whole = source[f"base_model.model.{path}.lora_{slot}.default.weight"]
            start = "qkv".index(part) * 64
            parameter.copy_(whole if slot == "A" else whole[start : start + 64])
    inputs = batch("gpt2")
    left, right = ours(**inputs), theirs(**inputs)
    assert_close(left.logits, right.logits, 1e-12)
    left.loss.backward()
    right.loss.backward()
    ours_gradients, theirs_gradients = gradients(ours), gradients(theirs)
    for layer in range(2):
        path = f"transformer.h.{layer}.attn.c_attn"
        parts = [f"{path}.adapters.lora_{part}" for part in "qkv"]
        whole = f"base_model.model.{path}.lora_"
        A = torch.stack([ours_gradients[f"{p}.A"] for p in parts]).sum(0)
        B = torch.cat([ours_gradients[f"{p}.B"] for p in parts])
        assert_close(A, theirs_gradients[f"{whole}A.default.weight"], 1e-12)
        assert_close(B, theirs_gradients[f"{whole}B.default.weight"], 1e-12)


class One(nn.Module):
    """A layer between activations that train nothing, and a loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Output:
        logits = torch.tanh(self.layer(x))
        return Output(
            (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum(), logits
        )


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


LAYERS = {
    "Linear": (lambda: nn.Linear(7, 5), lambda: activations(2, 3, 7)),
    "Conv1D": (lambda: Conv1D(5, 7), lambda: activations(2, 3, 7)),
    "Conv1d": (lambda: nn.Conv1d(7, 5, 3, stride=2, padding=1), lambda: activations(2, 7, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(0, 1), bias=False), lambda: activations(2, 3, 5, 7)),
    "Conv3d": (lambda: nn.Conv3d(3, 5, (1, 2, 3), stride=(1, 1, 2)), lambda: activations(2, 3, 2, 5, 7)),
    "Conv2d 1x1": (lambda: nn.Conv2d(3, 5, 1), lambda: activations(2, 3, 5, 7)),
    "Embedding": (lambda: nn.Embedding(11, 5), lambda: torch.tensor([[1, 3, 3], [0, 10, 1]])),
    "Embedding, padded": (lambda: nn.Embedding(11, 5, padding_idx=1), lambda: torch.tensor([[1, 3, 3], [0, 10, 1]])),
}
EMBEDDING = {"A": "lora_embedding_A.default", "B": "lora_embedding_B.default"}


def both(name: str, settings: str = "r=3, alpha=5", **theirs: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """One layer of that name adapted by us and by PEFT, with the same weights, and an input for it."""
    make, x = LAYERS[name]
    base = One(make()).double()
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["layer"], "fan_in_fan_out": name == "Conv1D", **theirs}
    theirs_ = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    return rewrite.attach(base, f'lora({settings})@"layer"'), theirs_, x()


def factors_of(ours: nn.Module, theirs: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's tensors by our names."""
    source = trained(theirs)
    names = {name: peft_name(name) for name in trained(ours)}
    if any("lora_embedding" in name for name in source):
        names = {name: f"base_model.model.layer.{EMBEDDING[name[-1]]}" for name in names}
    assert set(names.values()) == set(source)
    return {name: source[other] for name, other in names.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_starts_as_in_peft(name: str):
    torch.manual_seed(21)
    ours, theirs, _ = both(name, "r=64", r=64)
    for own, parameter in factors_of(ours, theirs).items():
        start, other = trained(ours)[own].detach(), parameter.detach()
        assert bool(start.any()) == bool(other.any()), own
        if not start.any():
            continue
        if name.startswith("Embedding"):
            assert 0.8 < start.std() < 1.2
            continue
        bound = start.shape[1] ** -0.5  # uniform: the same bound
        assert max(start.abs().max(), other.abs().max()) <= bound
        assert min(start.abs().max(), other.abs().max()) > 0.9 * bound
