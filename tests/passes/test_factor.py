"""The pass `factor`: every reader of an updated weight, against the dense weight, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from rewrite.codegen.forms import LowRank
from rewrite.codegen.maps import Rows
from rewrite.codegen.typed import typed
from rewrite.codegen.weights import LazyWeight, low_rank_weight
from rewrite.passes import pipeline
from rewrite.passes.operators import low_rank_weight as updated
from rewrite.passes.record import GraphRecord
from tests.models import assert_close
from tests.passes.graphs import capture, inputs

Tensor = torch.Tensor
E, OUT, IN, R, T = 5, 22, 12, 3, 4
SCALE = 1.7


def adapt(transposed: bool) -> Callable[..., Tensor]:
    def reference(W: Any, A: Any, B: Any) -> Any:
        return low_rank_weight(W, A, B, SCALE, transposed)

    return typed("update", "weight", reference)


ADAPT = {False: adapt(False), True: adapt(True)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def parts(experts: tuple[int, ...], transposed: bool, out: int = OUT, columns: int = IN) -> list[Tensor]:
    """W, A and B; W has `out` rows and `columns` columns as it is stored."""
    d_out, d_in = (columns, out) if transposed else (out, columns)
    A, B = random(*experts, R, d_in, seed=1), random(*experts, d_out, R, seed=2)
    return [random(*experts, out, columns), A.requires_grad_(), B.requires_grad_()]


def dense(W: Tensor, A: Tensor, B: Tensor, transposed: bool) -> Tensor:
    update = B @ A
    return W + SCALE * (update.mT if transposed else update)


def results(y: Any, wanted: list[Tensor]) -> list[Tensor]:
    """A value and the gradients of a loss that tells its entries apart."""
    ys = [t for t in (y if isinstance(y, (tuple, list)) else [y]) if isinstance(t, Tensor)]
    loss = sum((t * torch.arange(1, t.numel() + 1, dtype=t.dtype).view(t.shape).cos()).sum() for t in ys)
    return [*ys, *torch.autograd.grad(loss, wanted)]  # type: ignore[arg-type]


def check(read: Callable[..., Any], x: Tensor, weight: list[Tensor], transposed: bool) -> tuple[Any, GraphRecord]:
    """Rewritten graph and eager lazy weight against the dense weight; returns the graph and its record."""
    if x.is_floating_point():
        x.requires_grad_()
    wanted = [weight[1], weight[2], *([x] if x.requires_grad else [])]
    expected = results(read(x, dense(*weight, transposed)), wanted)

    def program(x, W, A, B):
        return read(x, ADAPT[transposed](W, A, B))

    gm, record = capture(program, x, *weight), GraphRecord("test")
    pipeline.run(gm, record)
    for ours, theirs in zip(results(gm(*inputs(gm)), wanted), expected, strict=True):
        assert_close(ours, theirs)
    lazy = low_rank_weight(*weight, SCALE, transposed)
    assert isinstance(lazy, LazyWeight)
    for ours, theirs in zip(results(read(x, lazy), wanted), expected, strict=True):
        assert_close(ours, theirs)
    return gm, record


def grown(gm: Any) -> list[str]:
    """Computed matrices that depend on what is trained and are wider than tokens, rank and experts both ways."""
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method") and n.meta.get("rule") != "batch"]
    values = [(n, n.meta["example_value"]) for n in nodes]
    trained = [(n, v) for n, v in values if isinstance(v, Tensor) and v.requires_grad and v.ndim > 1]
    return [str(n) for n, v in trained if min(v.shape[-2:]) > max(E, R, T)]


OFFS = torch.tensor([1, 1, 2, 3, 4], dtype=torch.int32)
ROUTED = torch.tensor([3, 0, 3, 1])

# name: (read(x, W'), x, experts, rows and columns of W as stored)
READERS: dict[str, tuple[Callable[..., Any], Tensor, tuple[int, ...], tuple[int, int]]] = {
    "linear": (lambda x, w: F.linear(x, w), random(2, T, IN), (), (OUT, IN)),
    "linear bias": (lambda x, w: F.linear(x, w, torch.ones(OUT, dtype=x.dtype)), random(T, IN), (), (OUT, IN)),
    "linear t": (lambda x, w: F.linear(x, w.t()), random(T, OUT), (), (OUT, IN)),
    "x @ w": (lambda x, w: x @ w, random(2, T, OUT), (), (OUT, IN)),
    "vector @ w": (lambda x, w: x @ w, random(OUT), (), (OUT, IN)),
    "w @ x": (lambda x, w: w @ x.transpose(1, 2), random(2, T, IN), (), (OUT, IN)),
    "w @ vector": (lambda x, w: torch.mv(w, x), random(IN), (), (OUT, IN)),
    "matmul mT": (lambda x, w: torch.matmul(x, w.mT), random(T, IN), (), (OUT, IN)),
    "mm T": (lambda x, w: torch.mm(x, w.T), random(T, IN), (), (OUT, IN)),
    "addmm": (
        lambda x, w: torch.addmm(x[:, :1], x, w.permute(1, 0), beta=0.5, alpha=2.0),
        random(T, IN),
        (),
        (OUT, IN),
    ),
    "embedding": (lambda x, w: F.embedding(x, w, padding_idx=1), torch.tensor([[3, 1], [0, 3]]), (), (OUT, IN)),
    "rows by ids": (lambda x, w: x @ w[ROUTED].t(), random(T, IN), (), (OUT, IN)),
    "einsum": (lambda x, w: torch.einsum("bti,oi->bto", x, w), random(2, T, IN), (), (OUT, IN)),
    "einsum swapped": (lambda x, w: torch.einsum("oi,bto->bti", w, x), random(2, T, OUT), (), (OUT, IN)),
    "einsum experts": (lambda x, w: torch.einsum("ti,eoi->teo", x, w), random(T, IN), (E,), (OUT, IN)),
    "einsum sum": (lambda x, w: torch.einsum("eti,eoi->to", x, w), random(E, T, IN), (E,), (OUT, IN)),
    "heads": (lambda x, w: x @ w.view(2, OUT // 2, IN).transpose(1, 2), random(2, T, IN), (), (OUT, IN)),
    "chunk rows": (lambda x, w: [F.linear(x, p) for p in w.chunk(3)], random(T, IN), (), (OUT, IN)),
    "split rows": (lambda x, w: [F.linear(x, p) for p in w.split([4, 13, 5])], random(T, IN), (), (OUT, IN)),
    "split columns": (lambda x, w: x @ torch.split(w, 8, dim=1)[1], random(T, OUT), (), (OUT, IN)),
    "slice": (lambda x, w: F.linear(x[:, 1::2], w[2:9, 1::2]), random(T, IN), (), (OUT, IN)),
    "bmm": (lambda x, w: torch.bmm(x, w.transpose(-2, -1)), random(E, T, IN), (E,), (OUT, IN)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[..., :1], x, w), random(E, T, OUT), (E,), (OUT, IN)),
    "one expert": (lambda x, w: F.linear(x, w[3]), random(T, IN), (E,), (OUT, IN)),
    "experts hit": (
        lambda x, w: torch.bmm(w[ROUTED], x.unsqueeze(-1)).squeeze(-1),
        random(len(ROUTED), IN),
        (E,),
        (OUT, IN),
    ),
    "index_select": (lambda x, w: x @ w.index_select(0, ROUTED), random(T, OUT), (E,), (OUT, IN)),
    "unbind": (lambda x, w: [F.linear(x, e) for e in w.unbind(0)], random(T, IN), (E,), (OUT, IN)),
    "experts' gate rows": (lambda x, w: x @ w[1:4, : OUT // 2].mT, random(T, IN), (E,), (OUT, IN)),
    "expand": (lambda x, w: x @ w.unsqueeze(0).expand(4, -1, -1), random(4, T, OUT), (), (OUT, IN)),
    "grouped": (
        lambda x, w: torch.ops.rewrite.grouped_product(x, w.transpose(-2, -1), OFFS),
        random(T, IN),
        (E,),
        (OUT, IN),
    ),
    "grouped transposed": (lambda x, w: torch.ops.rewrite.grouped_product(x, w, OFFS), random(T, OUT), (E,), (OUT, IN)),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["out x in", "in x out"])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_multiplies_the_factors(name: str, transposed: bool):
    read, x, experts, (rows, columns) = READERS[name]
    weight = parts(experts, transposed, rows, columns)
    gm, record = check(read, x.clone(), weight, transposed)
    assert not [n for n in gm.graph.nodes if updated.arguments(n) is not None]
    assert not record.notes
    assert grown(gm) == []


def test_an_expert_by_a_tensor_in_eager():
    weight, x = parts((E,), False), random(T, IN)  # Dynamo cannot capture an index that is data
    lazy = low_rank_weight(*weight, SCALE)[ROUTED[2]]
    assert isinstance(lazy, LazyWeight)
    expected = results(F.linear(x, dense(*weight, False)[3]), weight[1:])
    for ours, theirs in zip(results(F.linear(x, lazy), weight[1:]), expected, strict=True):
        assert_close(ours, theirs)


DENSE: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "norm": (lambda x, w: w.norm() * x, random(T)),
    "flatten": (lambda x, w: x * w.flatten()[:T], random(T)),
    "whole list": (lambda x, w: torch.cat(w.chunk(2, 1)) * x[0], random(T)),
    "max_norm": (lambda x, w: w.amax(0) * x[0], random(T)),
}


@pytest.mark.parametrize("name", DENSE)
def test_another_reader_keeps_the_dense_weight_and_says_so(name: str):
    read, x = DENSE[name]
    gm, record = check(read, x.clone(), parts((), False), False)
    assert [n for n in gm.graph.nodes if updated.arguments(n) is not None]
    assert len(record.notes) == 1
    assert record.notes[0].text.startswith("not factored: ")


def test_a_weight_that_nobody_reads_is_not_formed():
    gm, _ = check(lambda x, w: F.linear(x, w.chunk(2)[0]), random(T, IN), parts((), False), False)
    assert sum("narrow" in str(n.target) for n in gm.graph.nodes) == 2  # of W and of B, for the half that is read


def test_two_updates_of_one_weight_become_one_branch():
    W, A, B = parts((E,), False)
    A2, B2 = random(E, 2, IN, seed=7).requires_grad_(), random(E, OUT, 2, seed=8).requires_grad_()
    x = random(T, IN)

    def read(x, W, A, B, A2, B2):
        return F.linear(x, ADAPT[False](ADAPT[False](W, A, B), A2, B2)[1])

    expected = results(F.linear(x, (W + SCALE * (B @ A) + SCALE * (B2 @ A2))[1]), [A, B, A2, B2])
    gm, record = capture(read, x, W, A, B, A2, B2), GraphRecord("test")
    pipeline.run(gm, record)
    for ours, theirs in zip(results(gm(*inputs(gm)), [A, B, A2, B2]), expected, strict=True):
        assert_close(ours, theirs)
    assert "stack" in {e.rule for e in record.edits}
    lazy = low_rank_weight(low_rank_weight(W, A, B, SCALE), A2, B2, SCALE)
    for ours, theirs in zip(results(F.linear(x, lazy[1]), [A, B, A2, B2]), expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "thirds"])
def test_updates_of_different_rows_stay_apart(split: bool):
    W, x = random(3 * IN, IN), random(T, IN)
    theta = [random(R, IN, seed=1), random(len(Q), R, seed=2), random(2, IN, seed=3), random(len(V), 2, seed=4)]
    theta = [t.requires_grad_() for t in theta]
    q, v = (typed("lora", "weight", lambda W, A, B, r=r: LowRank(B, A).add_to(W, rows=r)) for r in (Q, V))

    def read(x, W, A1, B1, A2, B2):
        w = v(q(W, A1, B1), A2, B2)
        return [F.linear(x, p) for p in w.chunk(3)] if split else F.linear(x, w)

    A1, B1, A2, B2 = theta
    full = W + Q.put(B1 @ A1) + V.put(B2 @ A2)
    expected = results([F.linear(x, p) for p in full.chunk(3)] if split else F.linear(x, full), theta)
    for ours, theirs in zip(results(read(x, W, *theta), theta), expected, strict=True):
        assert_close(ours, theirs)
    gm, record = capture(read, x, W, *theta), GraphRecord("test")
    pipeline.run(gm, record)
    for ours, theirs in zip(results(gm(*inputs(gm)), theta), expected, strict=True):
        assert_close(ours, theirs)
    assert not record.notes
    fused = [n for n in gm.graph.nodes if "adapted_linear" in str(n.target)]
    factors = [B.meta["example_value"].shape for n in fused for B in n.args[5]]
    assert sorted(factors) == sorted([B1.shape, B2.shape])
    assert len(fused) == (2 if split else 1)


def test_a_factored_linear_is_fused():
    gm, record = check(lambda x, w: F.linear(x, w), random(T, IN), parts((), False), False)
    assert sum("adapted_linear" in str(n.target) for n in gm.graph.nodes) == 1
    assert "factor_linear" in {e.rule for e in record.edits}


def test_slices_of_one_weight_share_their_down_projection():
    gm, _ = check(lambda x, w: [F.linear(x, p) for p in w.chunk(3)], random(T, IN), parts((), False), False)
    assert sum("linear" in str(n.target) and "adapted" not in str(n.target) for n in gm.graph.nodes) == 1
    assert sum("adapted_linear" in str(n.target) for n in gm.graph.nodes) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_weight_casts_the_factors(dtype: torch.dtype):
    W, A, B = parts((), False)
    lazy = low_rank_weight(W.float(), A, B, SCALE).to(dtype)
    assert isinstance(lazy, LazyWeight)
    assert lazy.dtype == dtype
    y = F.linear(random(T, IN).to(dtype), lazy)
    assert y.dtype == dtype
    assert_close(y.double(), F.linear(random(T, IN), dense(W, A, B, False)), 0.05)


class Attention(nn.MultiheadAttention):
    """Attention over one input, or from one to another, with an update of its fused weight and of its output's."""

    def __init__(self, rows: Rows | None, **settings: Any) -> None:
        super().__init__(IN, 2, batch_first=True, dtype=torch.float64, **settings)
        self.requires_grad_(False)
        name = "in_proj_weight" if self.in_proj_weight is not None else "q_proj_weight"
        for path, tensor, part in (("", name, rows), ("out_proj", "weight", None)):
            module = self.get_submodule(path)
            adapter = Update(module.get_parameter(tensor), part)
            parametrize.register_parametrization(module, tensor, adapter, unsafe=True)


class Update(nn.Module):
    def __init__(self, W: Tensor, rows: Rows | None) -> None:
        super().__init__()
        d_out, d_in = len(rows) if rows else W.shape[0], W.shape[1]
        self.A, self.B = nn.Parameter(random(R, d_in, seed=5)), nn.Parameter(random(d_out, R, seed=6))
        self.op = typed("lora", "weight", lambda W, A, B: (LowRank(B, A) * SCALE).add_to(W, rows=rows))

    def forward(self, W: Tensor) -> Tensor:
        return self.op(W, self.A, self.B)


Q, V = Rows(1, 0, IN, 3 * IN), Rows(1, 2 * IN + 3, 3 * IN - 1, 3 * IN)


SETTINGS = {"plain": {}, "no bias": {"bias": False}, "bias kv": {"add_bias_kv": True, "add_zero_attn": True}}
ATTENTION = [(s, i, r) for s in SETTINGS for i in ("self", "memory", "apart") for r in ("all", "q", "some of v")]


@pytest.mark.parametrize(("settings_", "inputs_", "rows_"), [*ATTENTION, ("separate", "apart", "all")])
def test_attention_is_opened(settings_: str, inputs_: str, rows_: str, monkeypatch: pytest.MonkeyPatch):
    separate, rows = settings_ == "separate", {"all": None, "q": Q, "some of v": V}[rows_]
    model = Attention(rows, **({"kdim": 9, "vdim": 7} if separate else SETTINGS[settings_]))
    x, memory = random(2, T, IN), random(2, T + 2, IN, seed=9)
    given = {"self": (x, x, x), "memory": (x, memory, memory), "apart": (x, memory, memory + 1)}[inputs_]
    if separate:
        given = (x, memory[..., :9], memory[..., :7])
    theta = [p for p in model.parameters() if p.requires_grad]
    with monkeypatch.context() as patch:
        patch.setattr("rewrite.codegen.weights._is_plain", lambda _: False)  # no lazy weights
        expected = results(model(*given), theta)
    with monkeypatch.context() as patch:
        patch.setattr("rewrite.codegen.weights.densify", None)  # a reader that wants the dense weight fails
        for ours, theirs in zip(results(model(*given), theta), expected, strict=True):
            assert_close(ours, theirs)
    gm, record = capture(model, *given), GraphRecord("test")
    pipeline.run(gm, record)
    for ours, theirs in zip(results(gm(*inputs(gm)), theta), expected, strict=True):
        assert_close(ours, theirs)
    assert not record.notes
    assert not [n for n in gm.graph.nodes if updated.arguments(n) is not None]
    branches = [n for n in gm.graph.nodes if "adapted_linear" in str(n.target) and n.args[4]]
    projections = 1 if rows is not None or separate or inputs_ == "self" else 2 if inputs_ == "memory" else 3
    assert len(branches) == projections + 1  # only where there are rows of the update, and the output's
    if rows is not None:
        (B,) = branches[0].args[5]  # type: ignore[misc]
        assert B.meta["example_value"].shape == (len(rows), R)  # as it is: no zeros around it


def step(draw: Any, ndim: int, shape: tuple[int, ...]) -> tuple[str, Callable[[Any], Any]] | None:
    """One random view of a weight with that shape."""
    rows, columns = shape[-2:]
    start = draw(st.integers(0, max(rows - 2, 0)))
    views: dict[str, Callable[[Any], Any]] = {
        "transpose": lambda w: w.transpose(-2, -1),
        "permute": lambda w: w.permute(*range(ndim - 2), ndim - 1, ndim - 2),
        "mT": lambda w: w.mT,
        "rows": lambda w: w[..., start:, :],
        "every other": lambda w: w[..., ::2],
        "narrow": lambda w: w.narrow(-2, start, rows - start),
        "chunk": lambda w: w.chunk(2, -1)[0],
        "split": lambda w: w.split(max(columns - 1, 1), -1)[0],
        "index_select": lambda w: w.index_select(-1, torch.arange(columns).flip(0)),
        "unsqueeze": lambda w: w.unsqueeze(0),
        "contiguous": lambda w: w.contiguous(),
    }
    if ndim > 2:
        leading = draw(st.integers(0, shape[0] - 1))
        views["expert"] = lambda w: w[leading]
        views["select"] = lambda w: w.select(0, leading)
        views["unbind"] = lambda w: w.unbind(0)[leading]
        views["by tensor"] = lambda w: w[torch.tensor([leading, 0])]
        views["newaxis"] = lambda w: w[:, None]
        views["flatten"] = lambda w: w.reshape(-1, *shape[-2:])
    name = draw(st.sampled_from(sorted(views)))
    return name, views[name]


@given(data=st.data(), transposed=st.booleans(), experts=st.sampled_from([(), (3,), (2, 3)]))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_chains_of_views_stay_factored(data: Any, transposed: bool, experts: tuple[int, ...]):
    weight = parts(experts, transposed, 7, 6)
    expected, lazy = dense(*weight, transposed), low_rank_weight(*weight, SCALE, transposed)
    for _ in range(data.draw(st.integers(1, 5))):
        name, view = step(data.draw, expected.ndim, tuple(expected.shape))  # type: ignore[misc]
        if min(expected.shape[-2:]) < 2 or (expected.ndim > 4 and name in ("unsqueeze", "newaxis")):
            continue
        expected, lazy = view(expected), view(lazy)
        assert isinstance(lazy, LazyWeight), name
        assert lazy.shape == expected.shape
    x = random(4, expected.shape[-2])
    for ours, theirs in zip(results(x @ lazy, weight[1:]), results(x @ expected, weight[1:]), strict=True):
        assert_close(ours, theirs)
