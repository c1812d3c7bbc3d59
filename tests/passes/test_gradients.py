"""What gradients cost, on joint graphs: against the counts of the graphs in which only some of them are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.dry_run import dry_run
from tests.models import llama, t5

IDS = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11, bias=False), nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def costs(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> list[dict[str, int]]:
    (record,) = dry_run(model, args, kwargs)
    return record.counts["gradients"]


def test_a_chain_of_layers():
    found = {c["name"]: (c["own"], c["chain"]) for c in costs(Chain(), torch.randn(4, 5))}
    assert found == {
        "three.weight": (2 * 4 * 11 * 3, 0),
        "three.bias": (0, 0),
        "two.weight": (2 * 4 * 7 * 11, 2 * 4 * 11 * 3),
        "one.weight": (2 * 4 * 5 * 7, 2 * 4 * 7 * 11),
        "one.bias": (0, 0),
    }


def modelled(found: list[dict[str, int]], chosen: set[str]) -> int:
    deepest = max(n for n, c in enumerate(found) if c["name"] in chosen)
    return sum(c["own"] for c in found if c["name"] in chosen) + sum(c["chain"] for c in found[: deepest + 1])


@pytest.mark.parametrize("build", [llama, t5], ids=["llama", "t5"])
def test_all_of_them_are_the_backward_pass(build):
    model = build(num_layers=1) if build is t5 else build(num_hidden_layers=1)
    (record,) = dry_run(model, kwargs=BATCH)
    found = record.counts["gradients"]
    assert {c["name"] for c in found} <= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert sum(c["own"] + c["chain"] for c in found) == record.counts["backward_flops"]


CHOICES = [
    ["layers.2.mlp.up_proj", "layers.2.self_attn.v_proj", "lm_head"],
    ["layers.1.self_attn.q_proj", "layers.2.mlp"],
    ["layers.1.mlp.gate_proj", "norm"],
    ["layers.1.self_attn.o_proj", "layers.1.self_attn.k_proj"],
]


@pytest.fixture(scope="module")
def of_three_layers() -> list[dict[str, int]]:
    return costs(llama(num_hidden_layers=3), **BATCH)


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda c: c[0])
def test_some_of_them_are_what_a_graph_of_those_computes(chosen, of_three_layers):
    model, found = llama(num_hidden_layers=3), of_three_layers
    names = {n for n, _ in model.named_parameters() if any(part in n for part in chosen)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    (record,) = dry_run(model, kwargs=BATCH)
    assert modelled(found, names) == pytest.approx(record.counts["backward_flops"], rel=0.01)


def test_adapters_are_counted_by_their_own_names():
    model = rewrite.attach(llama(num_hidden_layers=1), "lora(r=3)@attn.q,v")
    found = costs(model, **BATCH)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {c["name"] for c in found} == trained
    (record,) = dry_run(model, kwargs=BATCH)
    assert sum(c["own"] + c["chain"] for c in found) == record.counts["backward_flops"]
    own = {c["name"].partition("layers.")[2]: c["own"] for c in found}
    assert own["0.self_attn.q_proj.adapters.lora.B"] == 2 * 27 * 64 * 3
