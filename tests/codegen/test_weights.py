"""Lazy weights in eager models: they read as the dense weight everywhere, and form it only where they must."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from rewrite.codegen import weights
from rewrite.codegen.typed import typed
from rewrite.codegen.weights import LazyWeight, low_rank_weight
from tests.models import assert_close

Tensor = torch.Tensor
SCALE = 1.3


def parts(*leading: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(*leading, 11, 7), (*leading, 2, 7), (*leading, 11, 2)]
    W, A, B = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [W, A.requires_grad_(), B.requires_grad_()]


def dense(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return W + SCALE * (B @ A)


class Squared(torch.autograd.Function):
    """A function that overrides of torch functions do not see inside of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ (w * w).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] @ (w * w), 2 * w * (gradients[0].t() @ x)


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "arithmetic": lambda x, w: x @ (w * 2 + w.abs() - w / 3).t(),
    "norm": lambda x, w: x @ w.t() / w.norm(dim=1),
    "stack": lambda x, w: x @ torch.stack([w, w]).sum(0).t(),
    "cat": lambda x, w: x @ torch.cat([w, w]).t(),
    "weight as input": lambda x, w: F.linear(w, x),
    "one row": lambda x, w: x @ w[3],
    "in place": lambda x, w: x @ w.clone().mul_(2).t(),
    "function": lambda x, w: Squared.apply(x, w),  # type: ignore[return-value]
    "checkpoint": lambda x, w: checkpoint(lambda x: F.linear(x, w), x, use_reentrant=False),  # type: ignore[return-value]
    "both sides": lambda x, w: x @ w.t() @ w,
    "data": lambda x, w: F.linear(x, w) * w.data.sum() + w.detach().sum(),
    "iterated": lambda x, w: torch.stack([x @ row for row in w]),
}


@pytest.mark.parametrize("name", READS)
def test_a_reader_sees_the_dense_weight(name: str):
    read, theta = READS[name], parts()
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y, expected = read(x, low_rank_weight(*theta, SCALE)), read(x, dense(*theta))
    assert_close(y, expected)
    assert type(y) is Tensor
    ours, theirs = (torch.autograd.grad(t.square().sum(), theta[1:]) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_its_attributes_are_those_of_the_dense_weight():
    theta = parts(3)
    lazy, full = low_rank_weight(*theta, SCALE), dense(*theta)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(lazy, name) == getattr(full, name), name
    assert (lazy.size(1), lazy.stride(), lazy.numel(), len(lazy)) == (11, full.stride(), full.numel(), 3)
    assert isinstance(lazy, Tensor)
    assert lazy.grad_fn is not None
    assert repr(lazy.detach()) == repr(full.detach())
    assert torch.equal(low_rank_weight(*theta, SCALE).detach().clone(), full)


def test_a_pointer_is_to_the_dense_values():
    lazy = low_rank_weight(*parts(), SCALE)
    numbers = (lazy.data_ptr(), lazy.untyped_storage().nbytes())
    assert isinstance(lazy, LazyWeight)
    assert lazy.kept is not None
    assert numbers == (lazy.kept.data_ptr(), 11 * 7 * 8)


def test_nothing_of_the_size_of_the_weight_is_kept():
    theta, seen = parts(6), []
    own = {t.untyped_storage().data_ptr() for t in theta}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        lazy = low_rank_weight(*theta, SCALE)
        y = F.linear(torch.randn(5, 7, dtype=torch.float64), lazy[2])
    y.sum().backward()
    assert [t for t in seen if t.untyped_storage().data_ptr() not in own and t.numel() >= 11 * 7] == []


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_on_a_half_precision_weight(base: torch.dtype):
    W, A, B = parts(dtype=torch.float32)
    lazy = low_rank_weight(W.to(base), A, B, SCALE)
    y = F.linear(torch.randn(5, 7).to(base), lazy)
    y.float().sum().backward()
    assert y.dtype == lazy.dtype == base
    assert A.grad is not None
    assert A.grad.dtype == torch.float32
    assert torch.equal(lazy.clone(), W.to(base) + SCALE * (B.to(base) @ A.to(base)))


def test_autocast():
    theta, x = parts(dtype=torch.float32), torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = F.linear(x, low_rank_weight(*theta, SCALE)), F.linear(x, dense(*theta))
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_close(y, expected, 0.02)


class Adapted(nn.Module):
    def __init__(self, W: Tensor) -> None:
        super().__init__()
        theta = parts(*W.shape[:-2])
        self.A, self.B = nn.Parameter(theta[1].detach()), nn.Parameter(theta[2].detach())
        self.op = typed("update", "weight", lambda W, A, B: low_rank_weight(W, A, B, SCALE))

    def forward(self, W: Tensor) -> Tensor:
        return self.op(W, self.A, self.B)


def adapted() -> nn.Module:
    model = nn.Linear(7, 11).double().requires_grad_(False)
    parametrize.register_parametrization(model, "weight", Adapted(model.weight), unsafe=True)
    return model


def test_transforms_copies_and_files_see_the_dense_weight():
    model, x = adapted(), torch.randn(5, 7, dtype=torch.float64)
    assert type(model.weight) is LazyWeight
    expected = model(x)
    assert_close(copy.deepcopy(model)(x), expected)
    theta = dict(model.named_parameters())

    def loss(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, theta, (x,)).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(theta, x)
    whole = torch.func.grad(loss)(theta, x)
    for name, gradient in each.items():
        assert_close(gradient.sum(0), whole[name], name=name)
    file = io.BytesIO()
    torch.save(model.weight.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), model.weight.detach().clone())


def test_a_tracer_sees_no_lazy_weight():
    model, x = adapted(), torch.randn(5, 7, dtype=torch.float64)
    expected = model(x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    exported = torch.export.export(model, (x,), strict=False)
    assert_close(exported.module()(x), expected)
    assert_close(torch.jit.trace(model, x)(x), expected)  # type: ignore[operator]
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == expected.shape


def test_multi_head_attention_multiplies_the_factors(monkeypatch: pytest.MonkeyPatch):
    model = nn.MultiheadAttention(7, 1, bias=False, batch_first=True).double().requires_grad_(False)
    theta = torch.randn(2, 7, dtype=torch.float64), torch.randn(21, 2, dtype=torch.float64)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    weight = model.in_proj_weight
    del model.in_proj_weight
    model.in_proj_weight = dense(weight, *theta)
    expected, _ = model(x, x, x)
    model.in_proj_weight = low_rank_weight(weight, *theta, SCALE)
    monkeypatch.setattr(weights, "densify", None)  # any reader that wants it fails
    assert_close(model(x, x, x)[0], expected)
