"""The probe tells query, key and value apart, however the attention is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.zoo.probe import attention_operands


class Attention(nn.Module):
    """Softmax attention with the spelling of the products left open."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.spelling == "fused":
            return nn.functional.scaled_dot_product_attention(q, k, v)
        if self.spelling == "operators":
            weights = ((q @ k.mT) / 2 + torch.zeros(1)).softmax(-1)
            return nn.functional.dropout(weights, 0.0) @ v
        if self.spelling == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(torch.zeros(1, dtype=torch.bool), -1e9)
            return torch.einsum("bhij,bhjd->bhid", torch.softmax(weights, dim=-1), v)
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        weights = torch.baddbmm(torch.zeros(1), q, k.mT)
        weights += torch.ones(1)
        return torch.bmm(nn.functional.softmax(weights.float(), dim=-1).to(v.dtype), v)


def moved(model: nn.Module, batch: dict, weight: Tensor) -> set[str]:
    before = attention_operands(model, batch)
    with torch.no_grad():
        weight += 0.5
    after = attention_operands(model, batch)
    assert before is not None
    assert after is not None
    assert len(before) == len(after)
    return before[0].moved(after[0])


@pytest.mark.parametrize("spelling", ["fused", "operators", "einsum", "batched"])
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_the_operand_behind_a_projection_moves_and_no_other(spelling: str, role: str):
    model = Attention(spelling)
    assert moved(model, {"x": torch.randn(2, 5, 12)}, getattr(model, role).weight) == {role}


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_rows_of_a_fused_weight(role: str):
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    rows = model.in_proj_weight.view(3, 8, 8)["qkv".index(role)]
    assert moved(model, {"query": x, "key": x, "value": x}, rows) == {role}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_attention_of_transformers(implementation: str, role: str):
    config = BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=20)
    config._attn_implementation = implementation
    model = BertModel(config).eval()
    batch = {"input_ids": torch.arange(10).view(2, 5)}
    found = attention_operands(model, batch)
    assert found is not None
    assert [each.where.split(".")[2] for each in found] == ["0", "1"]
    weight = getattr(model.encoder.layer[0].attention.self, role).weight
    assert moved(model, batch, weight) == {role[0]}


def test_no_attention_is_no_answer():
    assert attention_operands(nn.Linear(3, 2), {"input": torch.randn(1, 3)}) is None


def test_the_model_is_left_as_it_was():
    model = Attention("fused")
    attention_operands(model, {"x": torch.randn(1, 3, 12)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
