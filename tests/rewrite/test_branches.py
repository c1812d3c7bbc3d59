"""Branches by their formulas, one token at a time, and what only some of them have: rules, routers, layers, tasks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import PolyConfig, get_peft_model
from torch import nn

import rewrite
from rewrite.runtime import attach as attaching
from tests.models import assert_close, assert_same, batch, build, disturb, gradients

ACTS = {
    "relu": lambda v: v.clamp_min(0),
    "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: v * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "tanh": torch.tanh,
}


class Pair(nn.Module):
    """Two layers, so that clauses have tensors in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 11), nn.Linear(11, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def adapted(spec: str) -> tuple[Any, Any, torch.Tensor]:
    """A pair, the same with adapters that are not at their start, and rows for it."""
    torch.manual_seed(4)
    base = Pair().double()
    model = Pair().double()
    model.load_state_dict(base.state_dict())
    return base, disturb(rewrite.attach(model, spec), 0.5), torch.randn(3, 4, 7, dtype=torch.float64)


def theta(layer: Any) -> dict[str, torch.Tensor]:
    (adapter,) = layer.adapters.values()
    return {name: value.detach() for name, value in adapter.tensors().items()}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("mode", ["series", "parallel"])
def test_adapter(act: str, mode: str):
    base, model, x = adapted(f'adapter(r=3, act={act}, mode={mode}, scale=0.7)@"first"')
    t, y = theta(model.first), base.first(x)
    z = y if mode == "series" else x
    h = ACTS[act](torch.einsum("rd,abd->abr", t["down"], z) + t["down_bias"])
    expected = base.second(y + 0.7 * (torch.einsum("or,abr->abo", t["up"], h) + t["up_bias"]))
    assert_close(model(x), expected)


@pytest.mark.parametrize(("r", "n"), [(6, 3), (5, 4)], ids=["divides", "padded"])
def test_compacter(r: int, n: int):
    base, model, x = adapted(f"compacter(r={r}, n={n}, act=tanh)@linear")
    rule = theta(model.first)["rule"]
    assert model.second.adapters.compacter.rule is model.first.adapters.compacter.rule

    def matrix(s: torch.Tensor, t: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return sum(torch.kron(rule[i], torch.outer(s[i], t[i])) for i in range(n))[:rows, :columns]  # type: ignore[index]

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        t, y = theta(getattr(model, name)), getattr(base, name)(x)
        width = y.shape[-1]
        h = torch.tanh(y @ matrix(t["down_s"], t["down_t"], width, r) + t["down_bias"])
        return y + h @ matrix(t["up_s"], t["up_t"], r, width) + t["up_bias"]

    assert_close(model(x), layer("second", layer("first", x)))


def test_hydra():
    base, model, x = adapted('hydra(r=2, heads=3, alpha=5)@"first"')
    t, y = theta(model.first), base.first(x)
    gates = torch.softmax(x @ t["router"].T, -1)
    added = sum(gates[..., i, None] * (x @ t["A"].T @ t["B"][i].T) for i in range(3))
    assert_close(model(x), base.second(y + 5 / 2 * added))


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_mola(top_k: int):
    base, model, x = adapted(f'mola(r=2, experts=4, top_k={top_k}, alpha=5)@"first"')
    t, y = theta(model.first), base.first(x)
    for row in range(3):
        for token in range(4):
            v = x[row, token]
            shares = torch.softmax(t["router"] @ v, 0)
            taken = shares.argsort(descending=True)[:top_k].tolist()
            for i in taken:
                y[row, token] += 5 / 2 * shares[i] / shares[taken].sum() * (t["B"][i] @ t["A"][i] @ v)
    assert_close(model(x), base.second(y))


def test_mola_counts_experts_by_layer():
    model = rewrite.attach(build("llama"), "mola(r=2, experts=(3, 6))@attn.q")
    counts = [name_of.A.shape[0] for name_of in (layer.self_attn.q_proj.adapters.mola for layer in model.model.layers)]  # type: ignore[union-attr]
    assert counts == [3, 6]
    with pytest.raises(rewrite.ResolveError, match=r"layers 0 to 0, and this is in layer 1"):
        rewrite.attach(build("llama"), "mola(r=2, experts=(3,))@attn.q")
    with pytest.raises(rewrite.ResolveError, match=r"this is in no layer"):
        rewrite.attach(build("llama"), "mola(r=2, experts=(3, 3))@head")
    with pytest.raises(rewrite.SpecError, match=r"top_k=3 of 2 experts"):
        rewrite.parse("mola(experts=(4, 2), top_k=3)@attn.q")


@pytest.mark.parametrize("splits", [1, 3])
def test_poly_equals_peft(splits: int):
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(12, 21)).double()
    config = PolyConfig(target_modules=["0"], r=2, n_tasks=3, n_skills=4, n_splits=splits)
    other = disturb(get_peft_model(build_copy(base), config).double(), 0.5).eval()
    model = rewrite.attach(build_copy(base), f'poly(r=2, skills=4, splits={splits}, tasks=3, task=1)@"0"').eval()
    layer, ours = other.base_model.model[0], model[0].adapters.poly  # type: ignore[union-attr,index]
    router = layer.poly_router["default"].module_logits
    pairs = {"A": layer.poly_lora_A["default"], "B": layer.poly_lora_B["default"], "logits": router}
    for name, value in pairs.items():
        ours.get_parameter(name).data.copy_(value)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    y, expected = model(x), layer(x, task_ids=torch.tensor([1, 1, 1]))
    assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same({n: ours.get_parameter(n).grad for n in pairs}, {n: p.grad for n, p in pairs.items()})
    assert_close(rewrite.merge(model)(x), expected)


def build_copy(base: nn.Module) -> Any:
    made = nn.Sequential(nn.Linear(12, 21)).double()
    made.load_state_dict(base.state_dict())
    return made


def test_poly_refuses_what_it_cannot_split():
    with pytest.raises(rewrite.ResolveError, match=r"splits=3 does not divide"):
        rewrite.attach(Pair(), "poly(splits=3)@linear")
    with pytest.raises(rewrite.SpecError, match=r"task=2 of tasks=2"):
        rewrite.parse("poly(tasks=2, task=2)@linear")


def test_adapters_stand_where_houlsby_et_al_put_them():
    planned = rewrite.plan(build("llama"), "adapter")
    assert {p.site.roles[0] for p in planned.placements} == {"attn.o", "ffn.down"}
    assert {p.site.roles[0] for p in rewrite.plan(build("llama"), "adapter@ffn.down").placements} == {"ffn.down"}
    with pytest.raises(rewrite.ResolveError, match=r"in parallel it maps the inputs of a linear layer"):
        rewrite.plan(build("llama"), "adapter(mode=parallel)@norm")


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(("llama", s) for s in ("adapter", "compacter", "hydra(r=2)@attn", "mola(r=2, experts=4)@attn", "poly@attn")),
        *(("gpt2", s) for s in ("compacter", "hydra(r=2)@attn")),  # Conv1D, and parts of a fused projection
    ],
)
def test_one_graph_also_with_checkpointing(name: str, spec: str):
    torch.manual_seed(3)
    model = disturb(rewrite.compile(build(name), spec, backend="eager")).train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    inputs = {**batch(name), "use_cache": False}
    outputs = []
    for call in (model, model._call_impl):
        call(**inputs).loss.backward()
        outputs.append(gradients(model))
    assert_same(outputs[0], outputs[1])
    assert all(bool(gradient.any()) for gradient in outputs[0].values())
    calls = attaching.require(model).calls
    assert (calls.total, calls.eager) == (1, 0)


def test_branches_in_half_precision_cast_their_tensors_down():
    model = disturb(rewrite.attach(Pair().bfloat16(), 'adapter(r=3)@"first" + mola(experts=2)@"second"'))
    y = model(torch.randn(3, 7, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".adapters." in n} == {torch.float32}
    y.sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "adapters" in n
    )
