"""Quantised storage on a model: foreign and dense checkpoints load into it, casts keep its bits, remove restores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rewrite
from rewrite.codegen import bitsandbytes_format, nf4
from rewrite.errors import RewriteError


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 9, bias=False)).to(dtype)


def foreign(base: nn.Module, double: bool, block: int = 64) -> dict[str, torch.Tensor]:
    """The state dict of `base` as bitsandbytes would save it."""
    state = {}
    for name, value in base.state_dict().items():
        if value.ndim == 2:
            tensors = nf4.Nf4Tensors.from_weight(value, block, double)
            state |= bitsandbytes_format.write(tensors, name)
        else:
            state[name] = value
    return state


def spec(double: bool) -> str:
    return f"nf4(linear, double_quant={str(double).lower()})"


@pytest.mark.parametrize("stored", [False, True], ids=["single", "double"])
def test_a_bitsandbytes_checkpoint_loads_exactly(stored):
    base = model()
    adapted = rewrite.attach(model(), spec(stored))
    assert not adapted.load_state_dict(foreign(base, stored)).missing_keys
    for index in (0, 2):
        expected = nf4.Nf4Tensors.from_weight(base[index].weight, 64, stored).dequantize()
        assert torch.equal(adapted[index].weight, expected)


def test_double_quantised_scales_load_into_single_storage_without_loss():
    base = model()
    adapted = rewrite.attach(model(), spec(False))
    adapted.load_state_dict(foreign(base, True))
    assert torch.equal(adapted[0].weight, nf4.Nf4Tensors.from_weight(base[0].weight, 64, True).dequantize())


@pytest.mark.parametrize(("stored", "block"), [(False, 64), (True, 128)])
def test_a_checkpoint_of_another_layout_says_how_to_attach(stored, block):
    adapted = rewrite.attach(model(), spec(True))
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    with pytest.raises(RewriteError, match=rf"nf4\(block={block}, double_quant={str(stored).lower()}\)"):
        adapted.load_state_dict(foreign(model(), stored, block))
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_a_dense_checkpoint_is_quantised_as_it_loads():
    other = nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 9, bias=False)).to(torch.bfloat16)
    adapted, expected = rewrite.attach(model(), spec(False)), rewrite.attach(copy.deepcopy(other), spec(False))
    adapted.load_state_dict(other.state_dict())
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


def test_its_own_state_dict_round_trips():
    adapted = rewrite.attach(model(), spec(True))
    again = rewrite.attach(model(), spec(True))
    again.load_state_dict(adapted.state_dict())
    assert torch.equal(again[0].weight, adapted[0].weight)


@pytest.mark.parametrize("stored", [False, True], ids=["single", "double"])
def test_casting_a_model_keeps_the_stored_bits(stored):
    adapted = rewrite.attach(model(), spec(stored))
    weight = adapted[0].weight
    cast = copy.deepcopy(adapted).float()
    assert cast[0].weight.dtype == torch.float32
    assert torch.equal(cast[0].weight, weight.float())
    assert cast(torch.randn(2, 20)).dtype == torch.float32
    assert torch.equal(cast.to(torch.bfloat16)[0].weight, weight)


def test_remove_restores_bit_for_bit_and_merge_leaves_a_dense_model():
    base = model()
    for finish in (rewrite.remove, rewrite.merge):
        plain = finish(rewrite.attach(copy.deepcopy(base), spec(False)))
        assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
        assert plain.state_dict().keys() == base.state_dict().keys()
        assert not any(m._load_state_dict_pre_hooks for m in plain.modules())
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), plain.parameters(), strict=True)) is False
    restored = rewrite.remove(rewrite.attach(copy.deepcopy(base), spec(False)))
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), restored.parameters(), strict=True))


def test_a_model_on_the_meta_device_takes_storage():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 9, bias=False)).to(torch.bfloat16)
    rewrite.attach(empty, spec(False))
    base = model()
    empty.load_state_dict(foreign(base, False), assign=True)
    assert torch.equal(empty[0].weight, nf4.Nf4Tensors.from_weight(base[0].weight).dequantize())
    with pytest.raises(RewriteError, match="was on the meta device"):
        rewrite.remove(empty)
