"""PEFT configurations as specs, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.errors import RewriteError
from rewrite.peft import from_config
from rewrite.peft.config import read
from rewrite.peft.targets import Target, modules_of
from rewrite.peft.terms import terms, universe
from tests.peft.models import build

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["lin0"]}

WITHOUT_MODEL = [
    ({}, r"lora(r=4, alpha=8.0)@/(?:.*\.)?(?:lin0)/"),
    ({"lora_alpha": 4, "target_modules": r".*\.(q|v)_proj"}, r"lora(r=4)@/.*\.(q|v)_proj/"),
    ({"use_dora": True, "lora_dropout": 0.1}, r"dora(r=4, alpha=8.0, dropout=0.1)@/(?:.*\.)?(?:lin0)/"),
    ({"init_lora_weights": "pissa"}, r"lora(r=4, alpha=8.0, init=pissa)@/(?:.*\.)?(?:lin0)/"),
    ({"exclude_modules": ["a.lin0"]}, r"lora(r=4, alpha=8.0)@/(?!(?:.*\.)?(?:a\.lin0)$)(?:.*\.)?(?:lin0)/"),
    (
        {"modules_to_save": ["head"]},
        r"lora(r=4, alpha=8.0)@/(?!(?:.*\.)?(?:head)(?:\.|$))(?:.*\.)?(?:lin0)/ + full(/.*(?:head)/)",
    ),
    (
        {"rank_pattern": {"b.lin0": 8}},
        r"lora@/(?=(?:.*\.)?(?:b.lin0)$)(?:.*\.)?(?:lin0)/"
        r" + lora(r=4, alpha=8.0)@/(?!(?:.*\.)?(?:b.lin0)$)(?:.*\.)?(?:lin0)/",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), WITHOUT_MODEL)
def test_a_configuration_alone_becomes_patterns(changes: dict[str, Any], expected: str):
    assert from_config(PLAIN | changes) == expected
    assert str(rewrite.parse(expected))  # it is a spec


WITH_MODEL = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}, 'lora(r=4, alpha=8.0)@"*.q_proj","*.v_proj"'),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]},
     'lora(r=4, alpha=8.0)@"model.layers.1.self_attn.q_proj"'),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.0.*": 2}},
     'lora(r=2, alpha=8.0)@"model.layers.0.self_attn.q_proj" + lora(r=4, alpha=8.0)@"model.layers.1.self_attn.q_proj"'),
    ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"},
     'lora(r=4, alpha=8.0)@"*.query" + full("classifier")'),
    ("mha", {"target_modules": ["mha"]},
     'lora(r=4, alpha=8.0)@"mha.in_proj_weight" + lora(r=4, alpha=16.0)@"mha.out_proj"'),
    ("mlp", {"bias": "lora_only"}, 'lora(r=4, alpha=8.0)@"lin0" + bitfit@"lin0"'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "expected"), WITH_MODEL)
def test_with_a_model_a_spec_names_what_peft_would_wrap(name: str, changes: dict[str, Any], expected: str):
    assert from_config(PLAIN | changes, build(name, torch.float32)) == expected


@pytest.mark.parametrize("changes", [each for each, _ in WITHOUT_MODEL])
def test_both_spellings_select_the_same(changes: dict[str, Any]):
    if changes.get("target_modules"):
        pytest.skip("of another model")
    one, other = (rewrite.plan(build("mlp", torch.float32), text) for text in _both(PLAIN | changes))
    rows = [[(r["site"], r["method"], r["trainable"]) for r in plan.rows()] for plan in (one, other)]
    assert sorted(rows[0]) == sorted(rows[1])


def _both(config: dict[str, Any]) -> tuple[str, str]:
    changes = {"rank_pattern": {}} if "rank_pattern" in config else {}  # that layer is not in the model
    return from_config(config | changes), from_config(config | changes, build("mlp", torch.float32))


REFUSED = [
    ("mlp", {"use_qalora": True}, "use_qalora=True"),
    ("mlp", {"layer_replication": [[0, 2]]}, "layer_replication"),
    ("mlp", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    ("mlp", {"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    ("mlp", {"ensure_weight_tying": True}, "ensure_weight_tying"),
    ("mlp", {"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3.*does not know"),
    ("mlp", {"peft_type": "XLORA"}, "does not read XLORA"),
    ("mlp", {"bias": "sometimes"}, "bias='sometimes'"),
    ("mlp", {"r": 0}, "r=0"),
    ("mlp", {"r": "4"}, "r='4'"),
    ("mlp", {"lora_alpha": None, "target_modules": "(unclosed"}, "target_modules.*no regular expression"),
    ("mlp", {"target_modules": ["nothing"]}, "match nothing"),
    ("mlp", {"target_modules": ["norm"]}, "does not adapt a LayerNorm"),
    ("mlp", {"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    ("mlp", {"target_modules": None}, "target_modules.*name them"),
    ("mlp", {"modules_to_save": ["in1"], "target_modules": ["lin1"]}, "modules_to_save.*adapted too"),
    ("mlp", {"target_parameters": ["lin0.weight"]}, "target_parameters.*among target_modules too"),
    ("grouped conv2", {"target_modules": ["conv"]}, "its groups"),
    ("dilated conv2", {"target_modules": ["conv"]}, "its dilation"),
    ("words", {"target_modules": ["emb"], "lora_bias": True}, "lora_bias"),
    ("words", {"target_modules": None, "target_parameters": ["emb.weight"]}, "target_parameters.*name it whole"),
    ("mha", {"target_modules": ["mha"], "use_dora": True}, "use_dora"),
    ("mha", {"target_modules": ["mha"], "init_lora_weights": "pissa"}, "init_lora_weights"),
    ("conv1", {"peft_type": "LOKR", "alpha": 8, "lora_alpha": None, "target_modules": ["conv"]}, "not adapt a Conv1d"),
    ("conv2", {"peft_type": "HRA", "lora_alpha": None, "target_modules": ["conv"]}, "its sides"),
    ("tied llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "shared with model.embed_tokens"),
    ("experts", {"target_modules": ["lin0"], "trainable_token_indices": {"lin1": [0]}}, "trainable_token_indices"),
    ("mlp", {"peft_type": "LOHA", "lora_alpha": None, "rank_dropout": 0.5}, "rank_dropout=0.5"),
    ("mlp", {"peft_type": "HRA", "lora_alpha": None, "apply_GS": True}, "apply_GS"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_translated_is_refused_by_name(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(RewriteError, match=message):
        from_config(PLAIN | changes, build(name, torch.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0]},
        {"bias": "all"},
        {"target_parameters": ["a.b"]},
        {"trainable_token_indices": [1]},
        {"rank_pattern": {"a": 2}, "alpha_pattern": {"b": 2}},
        {"target_modules": r"(a|b)+"},
    ],
)
def test_what_takes_a_model_says_so(changes: dict[str, Any]):
    with pytest.raises(RewriteError, match=r"pass (it|the model)"):
        from_config(PLAIN | changes)


def test_a_module_at_two_places_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    with pytest.raises(RewriteError, match="0 and 2 are one module"):
        from_config(PLAIN | {"target_modules": ["0"]}, model)


def test_a_weight_that_its_layer_does_not_apply_is_refused(tmp_path: Path):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.lin0.weight.t()

    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    save_file({"base_model.model.lin0.lora_A.weight": torch.zeros(4, 10)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RewriteError, match="lin0 is read without being called"):
        rewrite.load_peft(Reader(), tmp_path, inputs=(torch.zeros(2, 10),))


def test_names_match_as_in_peft():
    def matched(**fields: Any) -> list[str]:
        return [t.path for t in modules_of(build("deep", torch.float32), read({"peft_type": "LORA", **fields}))]

    assert matched(target_modules=["0.up"]) == ["model.layers.0.up"]
    assert matched(target_modules=["p"]) == []  # an ending stands behind a dot
    assert matched(target_modules="up") == []  # a regular expression matches in full
    assert matched(target_modules=["up"], exclude_modules=["layers.0"]) == [f"model.layers.{i}.up" for i in range(3)]
    named = ["model.layers.0.up", "down"]  # a name in full is meant in every layer
    assert matched(target_modules=named, layers_to_transform=[2]) == ["model.layers.0.up", "model.layers.2.down"]
    assert matched(target_modules=["0"], layers_to_transform=[2]) == ["model.layers.2.list.0"]


def test_terms_match_their_paths_and_nothing_else():
    everything = universe(build("deep", torch.float32))
    every = [f"model.layers.{i}.up" for i in range(3)]
    assert terms(every, everything) == ['"*.up"']
    assert terms(every[:2], everything) == [r"/model\.layers\.(0|1)\.up/"]
    assert terms(["head"], everything) == ['"head"']
    assert terms(["a[0]"], ["a[0]", "a0"]) == ['"a[[]0]"']
    assert Target("experts", nn.Identity(), "up").name == "experts.up"


def test_reading_takes_no_peft(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from rewrite.peft import from_config\n"
        f"print(from_config({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == WITHOUT_MODEL[0][1], done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no PEFT adapter"),
        ("{", "is damaged"),
        ("[]", "holds no fields"),
        ("{}", "does not say its peft_type"),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RewriteError, match=message):
        from_config(tmp_path)
