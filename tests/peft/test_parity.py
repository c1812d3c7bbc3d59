"""Every tuner that PEFT and rewrite both have, on every kind of layer: one adapter, by way of its files, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from tests.peft.harness import check, quiet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA

SINGLE: dict[str, Any] = {"dtype": torch.float32, "tolerance": 1e-5}
RESIDUAL: dict[str, Any] = {
    "dtype": torch.float32,
    "tolerance": 2e-4,
    "same_file": False,
}  # singular vectors, in float32
TIED: dict[str, Any] = {"merges": False}  # PEFT merges into the weight that both share


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})


def seeded_vera(**settings: Any) -> Any:
    with quiet():  # PEFT advises against it
        return peft.VeraConfig(r=4, save_projection=False, **settings)


BOTH = ["lin0", "lin1"]
EVERY = ["emb", "conv1d", "lin0"]
CONVS = ["conv", "narrow"]

LORA = [
    ("mlp", lora(target_modules=["lin0"]), {}),
    ("mlp", lora(target_modules=BOTH, use_dora=True), {}),
    ("mlp without bias", lora(target_modules=BOTH, use_rslora=True), {}),
    ("mlp", lora(target_modules=BOTH, lora_bias=True), {}),
    ("mlp", lora(target_modules=["lin0"], modules_to_save=["norm", "head"]), {}),
    ("mlp", lora(target_modules=["lin0"], bias="all", modules_to_save=["head"]), {"same_file": False}),
    ("mlp", lora(target_modules=["lin0"], bias="lora_only"), {}),
    ("mlp", lora(target_modules=BOTH, rank_pattern={"lin0": 2}, alpha_pattern={"lin1": 3}), {}),
    ("mlp", lora(target_modules=".*1", init_lora_weights="gaussian"), {}),
    ("mlp", lora(target_modules="all-linear", exclude_modules=["head"]), {}),
    ("deep", lora(target_modules=["up", "down"], layers_to_transform=[0, 2]), {}),
    ("deep", lora(target_modules=["up"], layers_to_transform=1, layers_pattern="layers"), {}),
    ("deep", lora(target_modules="all-linear", rank_pattern={"up": 2, r"layers\.1\.down": 3}), {}),
    ("nested", lora(target_modules="0", modules_to_save=["3"]), {}),
    ("nested", lora(target_modules=["0"], bias="all"), {}),
    ("words", lora(target_modules=EVERY), {}),
    ("words", lora(target_modules=EVERY, use_dora=True), {}),
    ("words", lora(target_modules=EVERY, lora_dropout=0.1), {}),
    ("padded words", lora(target_modules=["emb"]), {}),
    ("scaled words", lora(target_modules=EVERY), {}),
    *[(f"conv{d}", lora(target_modules=CONVS if d < 3 else ["conv"]), {}) for d in (1, 2, 3)],
    *[(f"conv{d}", lora(target_modules=["conv"], use_dora=True), {}) for d in (1, 2, 3)],
    ("conv2 without bias", lora(target_modules=CONVS), {}),
    ("conv2", lora(target_modules=["conv"], lora_bias=True), {}),
    ("bare", lora(target_parameters=["inner.weights"], target_modules=["lin0"]), {}),
    ("turned", lora(target_parameters=["inner.weights"]), {}),
    ("bare", lora(target_parameters=["lin0.weight"]), {}),
    ("experts", lora(target_parameters=["inner.up", "inner.down"]), {}),
    ("experts", lora(target_parameters=["inner.down"]), {}),
    ("turned experts", lora(target_parameters=["inner.up", "inner.down"]), {}),
    ("llama", lora(), {}),
    ("llama", lora(target_modules="all-linear"), {}),
    ("llama", lora(target_modules=["embed_tokens", "lm_head", "q_proj"]), {}),
    ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[4, 7]), {}),
    ("tied llama", lora(target_modules=["embed_tokens", "q_proj"]), TIED),
    ("tied llama", lora(target_modules=["lm_head", "q_proj"]), TIED),
    ("tied llama", lora(target_modules=["q_proj"], trainable_token_indices=[4, 7]), TIED),
    ("llama", lora(target_modules=["q_proj"], init_lora_weights="pissa"), RESIDUAL),
    ("llama", lora(target_modules=["q_proj"], init_lora_weights="olora", use_rslora=True), RESIDUAL),
    ("gpt2", lora(target_modules=["c_attn"], init_lora_weights="pissa"), RESIDUAL),
    ("gpt2", lora(target_modules=["c_attn", "mlp.c_proj"], use_dora=True), {}),
    ("bert", lora(target_modules=["query"], task_type="SEQ_CLS", bias="all"), {"same_file": False}),
    ("bert", lora(target_modules=["query", "word_embeddings"], bias="lora_only"), {}),
    (
        "qwen3_moe",
        lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        SINGLE,
    ),
]

LINEAR = [
    (peft.IA3Config(target_modules=BOTH, feedforward_modules=["lin1"]), {}),
    (peft.LoHaConfig(r=4, alpha=6, target_modules=BOTH), {}),
    (peft.LoKrConfig(r=2, alpha=6, target_modules=BOTH), {}),
    (peft.LoKrConfig(r=1, alpha=6, target_modules=BOTH, decompose_both=True, rank_pattern={"lin0": 2}), {}),
    (peft.HiraConfig(r=4, target_modules=BOTH), {}),
    (peft.GloraConfig(r=4, target_modules=BOTH), {}),
    (
        peft.GloraConfig(r=4, target_modules=BOTH, config_A_B="vector", config_C="vector", config_D_E="vector"),
        {},
    ),
    (peft.GloraConfig(r=4, target_modules=BOTH, config_A_B="constant", config_C="none"), {}),
    (peft.HiraConfig(r=4, target_modules=BOTH, rank_pattern={"lin0": 2}), {}),  # PEFT takes 4 for both
    (peft.MissConfig(r=3, target_modules=BOTH), {}),
    (peft.MissConfig(r=2, target_modules=["lin0"], init_weights="bat"), {}),
    (peft.MissConfig(r=2, mini_r=4, target_modules=["lin0"], init_weights="mini"), {}),
    (peft.GraloraConfig(r=4, alpha=6, target_modules=["lin0"]), {}),
    (peft.GraloraConfig(r=4, alpha=6, hybrid_r=2, target_modules=["lin0"]), {}),
    (peft.DeloraConfig(r=4, target_modules=BOTH, lambda_pattern={"lin0": 9}), {}),
    (peft.C3AConfig(block_size=2, target_modules=["lin0"]), SINGLE),
    (peft.C3AConfig(block_size=2, target_modules=["lin0", "head"], block_size_pattern={"head": 1}), SINGLE),
    (peft.OFTConfig(oft_block_size=2, target_modules=BOTH), {}),
    (peft.OFTConfig(r=5, oft_block_size=0, target_modules=BOTH, use_cayley_neumann=False), {}),
    (peft.OFTConfig(oft_block_size=2, target_modules=BOTH, coft=True, eps=0.1), {"tolerance": 1e-7}),
    (peft.OFTConfig(oft_block_size=2, target_modules=BOTH, block_share=True), {}),
    (peft.BOFTConfig(boft_block_size=2, target_modules=BOTH), {}),
    (peft.BOFTConfig(boft_block_num=5, boft_block_size=0, boft_n_butterfly_factor=1, target_modules=BOTH), {}),
    (peft.HRAConfig(r=4, target_modules=BOTH), {}),
    (peft.VeraConfig(r=4, target_modules=BOTH), SINGLE),
    (seeded_vera(target_modules=BOTH), SINGLE | {"same_file": False}),
    (peft.RandLoraConfig(r=4, target_modules=BOTH), SINGLE),
    (peft.RandLoraConfig(r=4, target_modules=BOTH, very_sparse=True), SINGLE),
    (peft.FourierFTConfig(n_frequency=20, target_modules=BOTH), SINGLE),
    (peft.FourierFTConfig(n_frequency=20, target_modules=BOTH, bias="fourier_only"), SINGLE),
    (peft.FourierFTConfig(n_frequency=20, target_modules=BOTH, scaling=9.0, n_frequency_pattern={"lin1": 30}), SINGLE),
    (peft.BOFTConfig(boft_block_size=2, target_modules=["lin0"], bias="boft_only"), {}),
    (peft.WaveFTConfig(n_frequency=20, target_modules=BOTH, n_frequency_pattern={"lin1": 30}), SINGLE),
    (peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=5, topk=3, target_modules=["lin0"]), SINGLE),
    (peft.RoadConfig(group_size=4, target_modules=["lin0"]), {}),
    (peft.RoadConfig(variant="road_2", group_size=10, target_modules=["lin0"]), {}),
    (peft.RoadConfig(variant="road_4", group_size=4, target_modules=["lin0"]), {}),
    (peft.ShiraConfig(r=2, target_modules=BOTH), SINGLE),
    (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=BOTH), {}),
    (peft.LNTuningConfig(target_modules=["norm"]), {}),
    (peft.LNTuningConfig(target_modules=["lin0", "norm"]), {}),
]

ELSEWHERE = [
    ("gpt2", peft.IA3Config(), {}),
    *[(name, peft.IA3Config(target_modules=CONVS, feedforward_modules=["narrow"]), {}) for name in ("conv2", "conv3")],
    # In float32 through the FFT of the processor: 1.003e-5 apart on an Intel Xeon, less on an AMD EPYC.
    (
        "deep",
        peft.FourierFTConfig(n_frequency=20, target_modules=["up"], n_frequency_pattern={"1.up": 9}),
        {**SINGLE, "tolerance": 2e-5},
    ),
    ("mlp without bias", peft.GloraConfig(target_modules=["lin0", "head"], config_A_B="none"), {}),
    ("mlp without bias", peft.GloraConfig(target_modules=["lin0"], config_A_B="none", modules_to_save=["head"]), {}),
    ("grouped conv2", peft.IA3Config(target_modules=["conv"], feedforward_modules=["conv"]), {}),
    *[(name, peft.LoHaConfig(r=4, alpha=6, target_modules=CONVS), {}) for name in ("conv1", "conv2", "grouped conv2")],
    ("dilated conv2", peft.LoKrConfig(r=1, alpha=6, target_modules=["conv"]), {}),
    ("conv2", peft.LoKrConfig(r=1, alpha=6, target_modules=CONVS, use_effective_conv2d=True), {}),
    *[(name, peft.HiraConfig(r=4, target_modules=["conv"]), {}) for name in ("conv1", "conv2", "conv3")],
    ("words", peft.HiraConfig(r=4, target_modules=["emb", "conv1d"]), {}),
    ("words", peft.OFTConfig(oft_block_size=2, target_modules=["emb"]), {}),
    ("square conv2", peft.OFTConfig(oft_block_size=2, target_modules=["narrow"]), {}),
    ("square conv2", peft.BOFTConfig(boft_block_size=2, target_modules=CONVS), {}),
    ("square conv2", peft.HRAConfig(r=4, target_modules=CONVS), {}),
    ("conv2", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=CONVS), {}),
    ("words", peft.GraloraConfig(r=3, gralora_k=3, alpha=6, target_modules=["conv1d"]), {}),
    ("words", peft.VeraConfig(r=4, target_modules=["conv1d", "lin0"]), SINGLE),
    ("words", peft.VBLoRAConfig(num_vectors=7, vector_length=1, target_modules=["conv1d", "lin0"]), SINGLE),
    ("mlp without bias", peft.RoadConfig(group_size=2, target_modules=["lin0"]), {}),
    ("words", peft.WaveFTConfig(n_frequency=9, target_modules=["conv1d"]), SINGLE),
    ("words", peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["emb"]), {}),
    ("llama", peft.TrainableTokensConfig(token_indices=[4, 3, 50], target_modules=["embed_tokens", "lm_head"]), {}),
    ("tied llama", peft.TrainableTokensConfig(token_indices=[4, 3, 50]), TIED),
    ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"), TIED),
    ("llama", peft.LNTuningConfig(), {}),
]

QV = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"], "gpt2": ["c_attn"]}


def named(cases: list[Any]) -> list[Any]:
    """The cases with what tells them apart as their names."""
    seen: dict[str, int] = {}
    found = []
    for name, config, settings in cases:
        words = f"{config.peft_type.value.lower()}-{name.replace(' ', '_')}"
        seen[words] = seen.get(words, 0) + 1
        found.append(pytest.param(name, config, settings, id=f"{words}-{seen[words]}"))
    return found


@pytest.mark.parametrize(("name", "config", "settings"), named(LORA))
def test_lora_equals_peft(name: str, config: Any, settings: dict[str, Any], tmp_path: Path):
    check(name, config, tmp_path, **settings)


@pytest.mark.parametrize(("name", "config", "settings"), named([("mlp", *case) for case in LINEAR]))
def test_linear_layers_equal_peft(name: str, config: Any, settings: dict[str, Any], tmp_path: Path):
    check(name, config, tmp_path, **settings)


@pytest.mark.parametrize(("name", "config", "settings"), named(ELSEWHERE))
def test_other_layers_equal_peft(name: str, config: Any, settings: dict[str, Any], tmp_path: Path):
    check(name, config, tmp_path, **settings)


def on_models() -> list[Any]:
    """Every tuner of linear layers on three architectures; the loss of AdaLoRA and blocks of C3A are of other tests."""
    found = []
    for name, modules in QV.items():
        kinds = [
            lora(target_modules=modules, lora_dropout=0.1),
            peft.LoHaConfig(r=4, target_modules=modules),
            peft.LoKrConfig(r=4, target_modules=modules),
            peft.GloraConfig(r=4, target_modules=modules),
            peft.MissConfig(r=4, target_modules=modules),
            peft.DeloraConfig(r=4, target_modules=modules),
            peft.OFTConfig(oft_block_size=4, target_modules=modules),
            peft.BOFTConfig(boft_block_size=4, target_modules=modules),
            peft.HRAConfig(r=4, target_modules=modules),
            peft.RoadConfig(group_size=8, target_modules=modules),
        ]
        everywhere = [
            peft.HiraConfig(r=4, target_modules=modules),
            peft.GraloraConfig(r=4, target_modules=modules),
            peft.VeraConfig(r=4, target_modules=modules),
            peft.RandLoraConfig(r=4, target_modules=modules),
            peft.VBLoRAConfig(num_vectors=20, vector_length=8, target_modules=modules),
            peft.FourierFTConfig(n_frequency=20, target_modules=modules),
            peft.WaveFTConfig(n_frequency=20, target_modules=modules),
        ]
        for config in (*([] if name == "gpt2" else kinds), *everywhere):
            # RandLoRA's scale of 160 takes its gradients out of what float32 resolves.
            single = {} if config.peft_type == "RANDLORA" else {"dtype": torch.float32, "tolerance": 1e-4}
            found.append((name, config, {"tolerance": 1e-6} | single))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "settings"), named(on_models()))
def test_models_equal_peft(name: str, config: Any, settings: dict[str, Any], tmp_path: Path):
    check(name, config, tmp_path, **settings)
