"""Partial back-propagation on the graphs of the real compile path: what is absent, what is kept, what is computed."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import rewrite
from rewrite.passes import partition
from rewrite.passes.record import GraphRecord
from rewrite.runtime.dry_run import dry_run

D, F, TOKENS, HEADS, VOCABULARY = 256, 688, 96, 8, 320
HEAD = D // HEADS
ALL = {(D, D), (F, D), (D, F)}
NORMAL = "linear-head"


@dataclass
class Step:
    """One counted step: its record and its graphs."""

    record: GraphRecord
    joint: list[fx.Node] = field(default_factory=list)
    backward: list[fx.Node] = field(default_factory=list)

    @property
    def saved(self) -> Counter[tuple[int, ...]]:
        return Counter(tuple(n for n in s["shape"] if n > 1) for s in self.record.counts["saved"])

    @property
    def saved_bytes(self) -> int:
        return self.record.counts["saved_bytes"]

    @property
    def flops(self) -> int:
        return self.record.counts["forward_flops"] + self.record.counts["backward_flops"]


@functools.cache
def counted(spec: str, layers: int = 1, dtype: torch.dtype = torch.bfloat16) -> Step:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    rewrite.attach(model, spec)
    graphs: list[list[fx.Node]] = []
    call = partition.Partitioner.__call__

    def look(self: Any, gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        joint = list(gm.graph.nodes)
        forward, backward = call(self, gm, *args, **kwargs)
        graphs.extend([joint, list(backward.graph.nodes)])
        return forward, backward

    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition.Partitioner, "__call__", look)
        (record,) = dry_run(model, kwargs={"input_ids": ids, "labels": ids})
    return Step(record, *graphs)


SPECS = {
    "s2ft": "s2ft(heads=2, channels=48)",
    "s2ft over nf4": "s2ft(heads=2, channels=48) + nf4(base)",
    "s2ft by weight": "s2ft(heads=2, channels=48, by=weight)",
    "neuroada": f"neuroada(k=1)@{NORMAL}",
    "shira": f"shira(r=2)@{NORMAL}",
    "spiel": f"spiel(density=0.01)@{NORMAL}",
    "lift": f"lift(r=2, every=10)@{NORMAL}",
    "sara": f"sara(share=0.02)@{NORMAL}",
}
LIKE_ANOTHER = ("s2ft by weight", "spiel", "lift", "sara")  # one of their kind goes through it every time
every_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, id=n, marks=[pytest.mark.slow] * (n in LIKE_ANOTHER)) for n, s in SPECS.items()],
)
PRODUCTS = ("mm.", "addmm", "matmul", "einsum", "sum_of_products", "_gradient", "adapted_linear")
WRITES = ("scatter", "index_put", "index_add", "index_copy", "slice_scatter")


def shapes(node: fx.Node) -> list[tuple[int, ...]]:
    values = node.meta.get("val")
    return [tuple(v.shape) for v in (values if isinstance(values, (list, tuple)) else [values]) if hasattr(v, "shape")]


def weight_sized(node: fx.Node) -> bool:
    flat = {(rows * columns,) for rows, columns in ALL}
    return any(s in ALL or s[::-1] in ALL or s in flat for s in shapes(node))


@every_spec
def test_no_weight_has_a_gradient_or_is_kept_or_written_to(spec: str):
    step = counted(spec)
    assert step.record.counts["saved"]
    products = [n for n in step.joint if any(p in str(n.target) for p in PRODUCTS)]
    assert products
    assert [n for n in products if weight_sized(n)] == []
    assert [n for n in step.joint if any(w in str(n.target) for w in WRITES) and weight_sized(n)] == []
    assert [s for s in step.saved if s in ALL or s[::-1] in ALL] == []


def test_these_checks_see_a_dense_gradient():
    step = counted("full(linear-head)")
    assert [n for n in step.joint if "mm" in str(n.target) and weight_sized(n)]


def test_no_backward_node_below_the_first_site():
    step = counted("s2ft(heads=2, channels=48)@attn.o[1:],ffn.down[1:]", 2)
    scopes = {
        str(path)
        for n in step.backward
        for path, _ in (n.meta.get("fwd_nn_module_stack") or n.meta.get("nn_module_stack") or {}).values()
    }
    assert any("layers.1" in s or "layers[1]" in s or "layers']._modules['1'" in s for s in scopes), scopes
    assert not any("layers.0" in s or "layers[0]" in s or "layers']._modules['0'" in s for s in scopes)


@pytest.mark.parametrize(
    ("spec", "trained", "added"),
    [
        ("s2ft(heads=2, channels=48)", D * (2 * HEAD + 48), 0),
        pytest.param("s2ft(heads=2, channels=48, by=weight)", D * (2 * HEAD + 48), 2, marks=pytest.mark.slow),
        (f"neuroada(k=1)@{NORMAL}", 4 * D + 2 * F + D, 2),
    ],
)
def test_a_layer_costs_two_products_of_the_base_and_the_gradient_of_what_trains(spec: str, trained: int, added: int):
    layer, plain = (counted(s, 2).flops - counted(s, 1).flops for s in (spec, "lora(r=1)@attn.o,ffn.down"))
    low_rank = 3 * (D + D + F + D)  # of B A, each in three products
    assert layer - plain == 2 * TOKENS * ((1 + added) * trained - low_rank)
    assert plain - 2 * TOKENS * low_rank >= 2 * TOKENS * 2 * (4 * D * D + 3 * D * F)


def test_a_slice_keeps_its_columns_of_the_input_alone():
    bare, sliced = counted("s2ft(heads=1, channels=16)"), counted("s2ft(heads=2, channels=48)")
    wider = 2 * TOKENS * HEAD  # bytes of bfloat16
    assert sliced.saved_bytes - bare.saved_bytes == wider
    assert sliced.saved[TOKENS, 2 * HEAD] == 1
    assert not sliced.saved[TOKENS, 48]  # channels are computed again, of gate and up, which are kept anyhow
    lora = counted("lora(r=1)@attn.o,ffn.down")  # which keeps the inputs of both
    assert sliced.saved_bytes < lora.saved_bytes


def test_sparse_updates_keep_the_inputs_and_nothing_a_product():
    lora, sparse = counted(f"lora(r=1)@{NORMAL}"), counted(f"neuroada(k=1)@{NORMAL}")
    assert sparse.saved_bytes <= lora.saved_bytes
